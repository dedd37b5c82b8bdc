"""Durations counted in fixed buckets, cheap enough for the path of every layer call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NUM_BUCKETS = 64
# Published: 16 us to 34 s. Faster than a doorbell, or slower than any deadline, is not worth a series.
_FIRST, _LAST = 14, 35
BOUNDS_S: tuple[float, ...] = tuple((1 << bits) / 1e9 for bits in range(_FIRST, _LAST + 1))
"""Upper bounds of the published buckets, in seconds: powers of two of nanoseconds."""


class Histogram:
    """Bucket i counts durations below 2**i nanoseconds and not below 2**(i - 1). One thread writes, any may read."""

    __slots__ = ("counts", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * _NUM_BUCKETS
        self.sum_ns = 0

    def note(self, ns: int) -> None:
        """Count one duration of less than 2**63 nanoseconds, and not negative."""
        self.counts[ns.bit_length()] += 1
        self.sum_ns += ns

    def to_json(self) -> dict[str, Any]:
        """{"sum_s", "counts": cumulative, one for each of BOUNDS_S and one more for all}."""
        counts = list(self.counts)
        cumulative = [sum(counts[: bits + 1]) for bits in range(_FIRST, _LAST + 1)]
        return {"sum_s": self.sum_ns / 1e9, "counts": [*cumulative, sum(counts)]}


def add(histograms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of several to_json(); at least one."""
    columns = zip(*(each["counts"] for each in histograms), strict=True)
    return {"sum_s": sum(each["sum_s"] for each in histograms), "counts": [sum(column) for column in columns]}
