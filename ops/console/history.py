"""Throughput, latency and load over the last minutes, from the counters in one status after another. Pure."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

KEEP_S = 900.0
# Heartbeats come every second: over a shorter time rates would jump by half.
_OVER_S = 8.0
_LATENCIES = {"first_token": "first_token_s", "inter_token": "inter_token_s"}
_RATES = {"generated_per_s": "generated_tokens", "prompt_per_s": "prompt_tokens", "requests_per_s": "finished"}

Status = Mapping[str, Any]


class History:
    """Samples of the last KEEP_S; a sample is what sample_between() returns."""

    def __init__(self) -> None:
        self.samples: deque[dict[str, Any]] = deque()
        self._statuses: deque[tuple[float, Status]] = deque()

    def add(self, now_s: float, status: Status) -> None:
        """`now_s` is Unix time."""
        self._statuses.append((now_s, status))
        while len(self._statuses) > 2 and now_s - self._statuses[1][0] >= _OVER_S:
            self._statuses.popleft()
        self.samples.append(sample_between(*self._statuses[0], now_s, status))
        while now_s - self.samples[0]["time_s"] > KEEP_S:
            self.samples.popleft()


def sample_between(before_s: float, before: Status, now_s: float, status: Status) -> dict[str, Any]:
    """Rates and latencies in between, None where nothing was observed; the rest as it is now."""
    engines = _loads(status["engines"])
    past = _loads(before["engines"])
    seconds = now_s - before_s
    sample: dict[str, Any] = {
        "time_s": now_s,
        "running": sum(load["running"] for load in engines.values()),
        "waiting": sum(load["waiting"] for load in engines.values()),
        "kv_cache_used": max((load["kv_cache_used"] for load in engines.values()), default=0.0),
        "workers": sum(r["state"] == "online" for shard in status["shards"] for r in shard["replicas"]),
    }
    for name, counter in _RATES.items():
        grown = sum(load[counter] - past.get(key, {}).get(counter, 0.0) for key, load in engines.items())
        sample[name] = max(0.0, grown) / seconds if seconds > 0 else None
    for name, key in _LATENCIES.items():
        bounds_s, counts = _observed(engines, past, key)
        sample[f"{name}_p50_s"] = quantile(0.5, bounds_s, counts)
        sample[f"{name}_p99_s"] = quantile(0.99, bounds_s, counts)
    return sample


def quantile(q: float, bounds_s: Sequence[float], counts: Sequence[float]) -> float | None:
    """Of a histogram with cumulative counts (the last one is of all), linear within a bucket; None when it is empty.

    As Prometheus' histogram_quantile (promql/quantile.go): beyond the last bound it is the last bound.
    """
    if not counts or counts[-1] <= 0:
        return None
    rank = q * counts[-1]
    below_s = below = 0.0
    for bound_s, count in zip(bounds_s, counts, strict=False):
        if count >= rank and count > below:
            return below_s + (bound_s - below_s) * (rank - below) / (count - below)
        below_s, below = bound_s, count
    return bounds_s[-1] if bounds_s else None


def _loads(engines: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of engines that have told it: one that starts has not."""
    return {engine["id"]: engine["load"] for engine in engines if engine["load"]}


def _observed(
    engines: Mapping[str, Mapping[str, Any]], past: Mapping[str, Mapping[str, Any]], key: str
) -> tuple[Sequence[float], list[float]]:
    """Bounds, and cumulative counts of what all engines have observed since `past`."""
    bounds_s: Sequence[float] = []
    total: list[float] = []
    for name, load in engines.items():
        counts = load[key]["counts"]
        before = past.get(name, {}).get(key, {}).get("counts") or [0.0] * len(counts)
        grown = [now - then for now, then in zip(counts, before, strict=True)]
        bounds_s = load[key]["le_s"] or bounds_s
        total = [a + b for a, b in zip(total, grown, strict=True)] if total and grown else total or grown
    return bounds_s, total
