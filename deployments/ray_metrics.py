"""Our readings through ray.util.metrics, so that whoever scrapes Ray's metrics agents has them too.

The agents are what Ray's Prometheus service discovery lists (docs.ray.io, "Collecting and monitoring metrics"); names
get the prefix ray_. Ray's counters can only be increased and its histograms only be fed one value after the other, so
counters are increased by what is new, and of histograms sum and count are handed on, as counters.
"""

from collections.abc import Iterable, Iterator, Mapping

from ray.util import metrics as ray_metrics

from cluster.catalogue import Kind, Metric
from cluster.readings import Reading


class RayMetrics:
    """Made once per process; publish() as often as wanted."""

    def __init__(self) -> None:
        self._metrics: dict[str, ray_metrics.Counter | ray_metrics.Gauge] = {}
        self._last: dict[tuple[str, tuple[str, ...]], float] = {}

    def publish(self, found: Iterable[Reading]) -> None:
        """Hand these readings on. Series that are not among them any more are forgotten."""
        seen = {}
        for metric, name, labels, value in map_to_ray(found):
            tags = dict(zip(metric.labels, labels, strict=True))
            if metric.kind is Kind.GAUGE:
                self._metric(ray_metrics.Gauge, name, metric).set(value, tags)
                continue
            seen[name, labels] = value
            new = value - self._last.get((name, labels), 0.0)
            if new > 0:
                self._metric(ray_metrics.Counter, name, metric).inc(new, tags)
        self._last = seen

    def _metric(self, kind: type, name: str, metric: Metric) -> ray_metrics.Counter | ray_metrics.Gauge:
        if name not in self._metrics:
            self._metrics[name] = kind(name, description=metric.help, tag_keys=metric.labels)
        return self._metrics[name]


def map_to_ray(found: Iterable[Reading]) -> Iterator[tuple[Metric, str, tuple[str, ...], float]]:
    """(metric, name, labels, value) for each number that Ray can carry."""
    for reading in found:
        metric, value = reading.metric, reading.value
        if isinstance(value, Mapping):
            yield metric, metric.name + "_sum", reading.labels, float(value["sum_s"])
            yield metric, metric.name + "_count", reading.labels, float(value["counts"][-1])
        else:
            yield metric, metric.name, reading.labels, float(value)
