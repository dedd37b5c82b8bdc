"""What an expert server measures beside its counters, and how it publishes both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cluster import wire
from cluster.histogram import Histogram
from cluster.session import Request


class Measures:
    """Times of one server's kernel calls. note() belongs to the server's thread."""

    def __init__(self, shape: wire.Agreement) -> None:
        self._shape = shape
        self._compute = Histogram()  # per kernel call
        self._queue = Histogram()  # per message: from its sending, on this host, to the kernel

    def note(self, batch: list[Request], begin_ns: int, compute_ns: int) -> None:
        """A kernel call for `batch` began at `begin_ns`."""
        self._compute.note(compute_ns)
        for request in batch:
            self._queue.note(begin_ns - request.arrived_ns)

    def to_json(
        self,
        counters: Mapping[str, int],
        rejected: Mapping[str, int],
        waiting: Iterable[Request],
        now_ns: int,
    ) -> dict[str, Any]:
        """What is published of a worker (cluster/readings.py), as plain JSON types.

        Bytes are those of computed calls, without padding.
        """
        messages, tokens = counters["computed_messages"], counters["computed_tokens"]
        headers_bytes, row_bytes = messages * wire.HEADER_BYTES, self._shape.row_bytes
        oldest_ns = min((request.arrived_ns for request in waiting), default=now_ns)
        return {
            "counters": dict(counters),
            "rejected": dict(rejected),
            "bytes_received": headers_bytes + tokens * (row_bytes + 8 * self._shape.top_k),
            "bytes_sent": headers_bytes + tokens * row_bytes,
            "oldest_wait_s": max(0, now_ns - oldest_ns) / 1e9,
            "seconds": {"compute": self._compute.to_json(), "queue": self._queue.to_json()},
        }
