"""What a simulation has seen: throughput by the second, latencies, and how the cluster came through losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.workload import Workload

# Throughput counts as recovered from a loss once it is so much of what it was before.
_RECOVERED = 0.9
_BEFORE_S = 3


@dataclass(frozen=True)
class Impact:
    """One loss: throughput before it, the least within a second after it, and seconds until it had recovered."""

    at_s: float
    node: str
    before: float
    lowest: float
    recovery_s: float


@dataclass(frozen=True)
class Outcome:
    """Of the whole run without the warm-up. Latencies in seconds, the curve in tokens of each second of the run."""

    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_mean_s: float
    itl_p99_s: float
    num_completed: int
    num_failed: int
    busiest_worker: float
    mean_worker: float
    busy: tuple[tuple[float, ...], ...]
    """Of each shard, the busy share of each of its workers."""
    curve: tuple[int, ...]
    impacts: tuple[Impact, ...]


class Recorder:
    """Collects while a simulation runs."""

    def __init__(self, load: Workload) -> None:
        self._load = load
        self._curve = [0] * math.ceil(load.duration_s)
        self._ttft_s: list[float] = []
        self._gaps_s: list[float] = []
        self._num_completed = self._num_failed = 0

    def token(self, now_s: float, sent_s: float, last_s: float) -> None:
        """A token came at now_s; the one before at last_s, 0 for none; its request was sent at sent_s."""
        self._curve[min(int(now_s), len(self._curve) - 1)] += 1
        if now_s < self._load.warm_up_s:
            return
        if last_s:
            self._gaps_s.append(now_s - last_s)
        else:
            self._ttft_s.append(now_s - sent_s)

    def complete(self, now_s: float) -> None:
        self._num_completed += now_s >= self._load.warm_up_s

    def fail(self) -> None:
        self._num_failed += 1

    def outcome(self, busy_s: Sequence[Sequence[float]]) -> Outcome:
        """`busy_s` of every worker, shard by shard, over the whole run."""
        load = self._load
        tokens = len(self._ttft_s) + len(self._gaps_s)
        busy = tuple(tuple(min(1.0, each / load.duration_s) for each in replicas) for replicas in busy_s)
        shares = [share for replicas in busy for share in replicas]
        return Outcome(
            tokens_per_s=tokens / (load.duration_s - load.warm_up_s),
            ttft_p50_s=percentile(self._ttft_s, 50),
            ttft_p99_s=percentile(self._ttft_s, 99),
            itl_mean_s=sum(self._gaps_s) / len(self._gaps_s) if self._gaps_s else math.nan,
            itl_p99_s=percentile(self._gaps_s, 99),
            num_completed=self._num_completed,
            num_failed=self._num_failed,
            busiest_worker=max(shares),
            mean_worker=sum(shares) / len(shares),
            busy=busy,
            curve=tuple(self._curve),
            impacts=tuple(impact_of(self._curve, loss.at_s, loss.node) for loss in load.losses),
        )


def impact_of(curve: Sequence[int], at_s: float, node: str) -> Impact:
    """What a loss did to the tokens of each second."""
    second = int(at_s)
    earlier = curve[max(0, second - _BEFORE_S) : second]
    before = sum(earlier) / len(earlier) if earlier else 0.0
    after = curve[second + 1 :]
    back = next((n for n, tokens in enumerate(after, 1) if tokens >= _RECOVERED * before), math.inf)
    lowest = min(after[: int(back)] if math.isfinite(back) else after, default=0)
    return Impact(at_s, node, before, lowest, float(back))


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest rank; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
