"""How many tokens each expert has computed, added up over the workers that hold it. Pure but for its state.

A worker sends its counters since its start as text: little-endian int64 in base64, one row of the shard's experts a
layer.
"""

from __future__ import annotations

import base64
from collections.abc import Collection

import numpy as np

from cluster.routing import Replica, RoutingTable


def encoded(tokens_LE: np.ndarray) -> str:
    """int64 [layers of a shard, its experts] as text."""
    return base64.b64encode(tokens_LE.astype("<i8").tobytes()).decode()


class ExpertLoad:
    """`total_LE`: int64 [layer, expert]. It never falls: what a worker that is gone has computed stays in it."""

    def __init__(self, table: RoutingTable) -> None:
        self._shards = {shard.shard_id: shard for shard in table.shards}
        self.total_LE = np.zeros((table.num_layers, table.num_experts), np.int64)
        self._last: dict[str, np.ndarray] = {}  # what each replica had counted when it was last heard

    def report(self, replica: Replica, tokens: str) -> None:
        """Count what is new in a worker's encoded() counters."""
        shard = self._shards[replica.shard_id]
        counts = np.frombuffer(base64.b64decode(tokens), "<i8")
        counts_LE = counts.reshape(shard.end_layer - shard.first_layer, len(shard.experts))
        last_LE = self._last.get(replica.replica_id, np.zeros_like(counts_LE))
        self.total_LE[shard.first_layer : shard.end_layer, list(shard.experts)] += counts_LE - last_LE
        self._last[replica.replica_id] = counts_LE

    def keep(self, replica_ids: Collection[str]) -> None:
        """Forget whoever is gone."""
        self._last = {name: last for name, last in self._last.items() if name in replica_ids}


def by_layers(tokens_LE: np.ndarray, max_series: int) -> list[tuple[str, int, int]]:
    """(layers, expert, tokens) of int64 [layers, experts]; neighbouring layers together where it would be too many.

    Layers are "3", or "0-7" for a range with both ends.
    """
    num_layers, num_experts = tokens_LE.shape
    size = -(-num_layers // max(1, max_series // num_experts))
    found = []
    for first in range(0, num_layers, size):
        last = min(first + size, num_layers) - 1
        label = str(first) if first == last else f"{first}-{last}"
        sums = tokens_LE[first : last + 1].sum(0).tolist()
        found += [(label, expert, tokens) for expert, tokens in enumerate(sums)]
    return found
