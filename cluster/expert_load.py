"""How many tokens each expert has computed, added up over the workers that hold it. Pure but for its state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cluster.routing import Shard


class ExpertLoad:
    """`total_LE`: int64 [layer, expert], from the counters of workers, which start at zero with each worker's life."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.total_LE = np.zeros((num_layers, num_experts), np.int64)
        self._last: dict[str, np.ndarray] = {}

    def report(self, replica_id: str, shard: Shard, tokens: Sequence[Sequence[int]]) -> None:
        """A worker's counters since its start, [layer - first_layer][expert of the shard]. Another shape is ignored."""
        now = np.asarray(tokens, np.int64)
        if now.shape != (shard.end_layer - shard.first_layer, len(shard.experts)):
            return
        before = self._last.get(replica_id, np.zeros_like(now))
        self.total_LE[shard.first_layer : shard.end_layer, list(shard.experts)] += now - before
        self._last[replica_id] = now

    def forget_all_but(self, replica_ids: Iterable[str]) -> None:
        """Workers that have left: what they have computed stays in the total."""
        known = set(replica_ids)
        self._last = {name: last for name, last in self._last.items() if name in known}
