"""What the expert router knows of the cluster's metrics: workers report, engines are asked. Pure but for its state."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from cluster.catalogue import MAX_EXPERT_SERIES
from cluster.routing import Replica, RoutingTable

# Scrapes that come closer together share one answer: who scrapes often shall not cost the engines more.
_SHARED_FOR_S = 0.5


class Telemetry:
    """One application's. Snapshots are plain JSON types."""

    def __init__(self, table: RoutingTable) -> None:
        self._shards = {shard.shard_id: shard for shard in table.shards}
        self._expert_tokens_LE = np.zeros((table.num_layers, table.num_experts), np.int64)
        self._seen: dict[str, np.ndarray] = {}  # what each replica had counted when it was last heard
        self._workers: dict[str, Mapping[str, Any]] = {}
        self._engines: dict[str, tuple[int, Mapping[str, Any]]] = {}
        self._number = 0
        self._begun_s = float("-inf")

    def worker_reports(self, replica: Replica, metrics: Mapping[str, Any]) -> None:
        """A worker's ExpertServer.metrics(), with "energy"."""
        self._workers[replica.replica_id] = {name: value for name, value in metrics.items() if name != "expert_tokens"}
        self._count(replica, np.frombuffer(base64.b64decode(metrics["expert_tokens"]), "<i8"))

    def _count(self, replica: Replica, counts: np.ndarray) -> None:
        """Add what is new: so the sum over replicas never falls when one of them is gone."""
        shard = self._shards[replica.shard_id]
        counts_LE = counts.reshape(shard.end_layer - shard.first_layer, len(shard.experts))
        seen_LE = self._seen.get(replica.replica_id, np.zeros_like(counts_LE))
        self._expert_tokens_LE[shard.first_layer : shard.end_layer, list(shard.experts)] += counts_LE - seen_LE
        self._seen[replica.replica_id] = counts_LE

    def keep(self, replica_ids: Collection[str], engine_ids: Collection[str]) -> None:
        """Forget whoever is gone."""
        for kept, names in ((self._workers, replica_ids), (self._seen, replica_ids), (self._engines, engine_ids)):
            for name in [name for name in kept if name not in names]:
                del kept[name]

    @property
    def number(self) -> int:
        """Of the newest scrape."""
        return self._number

    def begin_scrape(self, now_s: float) -> int:
        """The number of a scrape that every engine has to answer; that of the last one if it is just as good."""
        if now_s - self._begun_s > _SHARED_FOR_S:
            self._number += 1
            self._begun_s = now_s
        return self._number

    def engine_reports(self, engine_id: str, number: int, snapshot: Mapping[str, Any]) -> None:
        """An engine answers scrape `number`."""
        self._engines[engine_id] = (number, snapshot)

    def silent(self, number: int, engine_ids: Collection[str]) -> list[str]:
        """Engines that have not answered scrape `number`."""
        return sorted(name for name in engine_ids if self._engines.get(name, (0,))[0] < number)

    def to_json(self) -> dict[str, Any]:
        """{"workers": {id: ..}, "engines": {id: ..}, "expert_tokens": [[layers, expert, tokens], ..]}."""
        return {
            "workers": dict(self._workers),
            "engines": {name: snapshot for name, (_, snapshot) in self._engines.items()},
            "expert_tokens": expert_load(self._expert_tokens_LE),
        }


def expert_load(tokens_LE: np.ndarray, max_series: int = MAX_EXPERT_SERIES) -> list[tuple[str, int, int]]:
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
