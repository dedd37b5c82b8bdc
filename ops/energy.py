"""``switchyard energy``."""

import argparse
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError, SwitchyardError
from ops.runs import find_run

DESCRIPTION = """\
Measure what a running cluster takes: joules per token and tokens per kWh, by model and by worker.

  switchyard energy                 over ten seconds, while others ask the cluster for answers
  switchyard energy --seconds 60 --json

GPUs are read through NVML, CPUs and memory through RAPL (/sys/class/powercap), by each process's share of CPU time.
Where neither can be read, for want of rights or of counters as in most virtual machines, it says "not measured".

--json prints {"seconds", "models": [{"name", "tokens", "joules", "joules_per_token", "tokens_per_kwh"}],
  "workers": [{"name", "tokens", "joules", ..}]}; null is "not measured", or no tokens in that time.
"""

JOULES_PER_KWH = 3_600_000
_TIMEOUT_S = 15.0


class ScrapeFailed(SwitchyardError):
    """The cluster's /metrics did not answer."""


@dataclass(frozen=True)
class Use:
    """Tokens and energy of one model or worker in some time; joules None: not measured."""

    name: str
    tokens: float
    joules: float | None

    @property
    def joules_per_token(self) -> float | None:
        return None if self.joules is None or not self.tokens else self.joules / self.tokens

    @property
    def tokens_per_kwh(self) -> float | None:
        return None if not self.joules else self.tokens * JOULES_PER_KWH / self.joules

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "joules_per_token": self.joules_per_token, "tokens_per_kwh": self.tokens_per_kwh}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="how long to measure (default 10)")
    parser.add_argument("--port", type=int, help="port of the cluster's HTTP API, where several run on this machine")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Status 0 also where nothing is measured: that is an answer."""
    if arguments.seconds <= 0:
        raise ConfigError(f"--seconds: must be more than 0, not {arguments.seconds:g}.")
    url = find_run(arguments.port).http + "/metrics"
    before = scrape(url)
    time.sleep(arguments.seconds)
    after = scrape(url)
    models, workers = uses(before, after)
    if arguments.json:
        found = {"models": [use.to_json() for use in models], "workers": [use.to_json() for use in workers]}
        print(json.dumps({"seconds": arguments.seconds, **found}))
    else:
        print("\n".join(render(models, workers)))
    return 0


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(url: str) -> Samples:
    """{(series, sorted labels): value}. Raises ScrapeFailed."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            text = response.read().decode()
    except (urllib.error.URLError, OSError) as error:
        raise ScrapeFailed(f"{url} does not answer: {error}") from None
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def uses(before: Samples, after: Samples) -> tuple[list[Use], list[Use]]:
    """Of each model, with all engines and workers, and of each worker. Processes that came meanwhile count from 0."""
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    joules = _by(grown, "switchyard_energy_joules_total", "id")
    generated = _by(grown, "vllm:generation_tokens_total", "model_name")
    computed = _by(grown, "switchyard_worker_tokens_total", "replica")
    # One application serves one model: all of its processes work for it.
    total = sum(joules.values()) if joules else None
    models = [Use(name, tokens, total) for name, tokens in sorted(generated.items())]
    return models, [Use(name, tokens, joules.get(name)) for name, tokens in sorted(computed.items())]


def _by(grown: Samples, series: str, label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for (name, labels), value in grown.items():
        if name == series:
            key = dict(labels)[label]
            found[key] = found.get(key, 0.0) + value
    return found


def render(models: Iterable[Use], workers: Iterable[Use]) -> list[str]:
    """The lines that people read. A worker computes each token once for every layer that it holds."""
    lines = [f"{'model':<28}{'tokens':>12}{'joules':>14}{'J/token':>14}{'tokens/kWh':>14}"]
    lines += map(_line, models)
    lines += ["", f"{'worker':<28}{'layer tokens':>12}{'joules':>14}{'J/token':>14}{'tokens/kWh':>14}"]
    return [*lines, *map(_line, workers)]


def _line(use: Use) -> str:
    if use.joules is None:
        return f"{use.name:<28}{use.tokens:>12.0f}  not measured"
    rates = (use.joules_per_token, use.tokens_per_kwh)
    shown = "".join(f"{'-' if value is None else format(value, '.4g'):>14}" for value in rates)
    return f"{use.name:<28}{use.tokens:>12.0f}{use.joules:>14.1f}{shown}"
