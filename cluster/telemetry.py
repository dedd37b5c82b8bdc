"""What the expert router knows of the cluster's metrics: workers report, engines are asked. Pure but for its state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cluster.catalogue import MAX_EXPERT_SERIES
from cluster.expert_load import ExpertLoad, by_layers

# Scrapes that come closer together share one answer: who scrapes often shall not cost the engines more.
_SHARED_FOR_S = 0.5


class Telemetry:
    """One application's. Snapshots are plain JSON types."""

    def __init__(self, experts: ExpertLoad) -> None:
        self._experts = experts
        self._workers: dict[str, Mapping[str, Any]] = {}
        self._engines: dict[str, tuple[int, Mapping[str, Any]]] = {}
        self._number = 0
        self._begun_s = float("-inf")

    def worker_reports(self, replica_id: str, metrics: Mapping[str, Any]) -> None:
        """A worker's ExpertServer.metrics(), with "energy"."""
        self._workers[replica_id] = metrics

    def keep(self, replica_ids: Collection[str], engine_ids: Collection[str]) -> None:
        """Forget whoever is gone."""
        for kept, names in ((self._workers, replica_ids), (self._engines, engine_ids)):
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
            "expert_tokens": by_layers(self._experts.total_LE, MAX_EXPERT_SERIES),
        }
