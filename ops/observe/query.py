"""PromQL over the catalogue's metrics: a name or label that the catalogue does not have is an error here, not a hole in
a dashboard. All functions raise KeyError for an unknown metric and ValueError for a misused one.
"""

import re

from cluster.catalogue import BY_NAME, METRICS, Kind

GRAFANA_WINDOW = "$__rate_interval"
_NAME = re.compile(r"\b(?:switchyard_|vllm:)\w+")


def rate(name: str, *by: str, window: str = GRAFANA_WINDOW, where: str = "") -> str:
    """Increase per second of a counter, summed over all labels but `by`. `where` is a selector, as state="online"."""
    _check(name, by, Kind.COUNTER)
    return f"sum{_by(by)}(rate({name}{_where(where)}[{window}]))"


def gauge(name: str, *by: str, how: str = "sum", where: str = "") -> str:
    """A gauge, aggregated with `how` over all labels but `by`."""
    _check(name, by, Kind.GAUGE)
    return f"{how}{_by(by)}({name}{_where(where)})"


def quantile(share: float, name: str, *by: str, window: str = GRAFANA_WINDOW) -> str:
    """A quantile of a histogram."""
    _check(name, by, Kind.HISTOGRAM)
    return f"histogram_quantile({share}, sum by ({', '.join([*by, 'le'])}) (rate({name}_bucket[{window}])))"


def mean(name: str, *by: str, window: str = GRAFANA_WINDOW) -> str:
    """The mean of a histogram."""
    _check(name, by, Kind.HISTOGRAM)
    sums, counts = (f"sum{_by(by)}(rate({name}_{part}[{window}]))" for part in ("sum", "count"))
    return f"{sums} / {counts}"


def unit_of(name: str) -> str:
    """The catalogue's unit."""
    return BY_NAME[name].unit


def series_in(text: str) -> set[str]:
    """Every series of ours or vLLM's that a query names."""
    return set(_NAME.findall(text))


def unknown_series(text: str) -> set[str]:
    """Those that the catalogue does not have."""
    return series_in(text) - {series for metric in METRICS for series in metric.series}


def _check(name: str, by: tuple[str, ...], kind: Kind) -> None:
    metric = BY_NAME[name]
    if metric.kind is not kind or not set(by) <= set(metric.labels):
        raise ValueError(f"{name} is a {metric.kind.value} with labels {metric.labels}, not a {kind.value} by {by}")


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""


def _where(selector: str) -> str:
    return f"{{{selector}}}" if selector else ""
