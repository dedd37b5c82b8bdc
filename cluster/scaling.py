"""When a shard gets another replica and when it loses one: by how busy its workers are. Decisions only, no clock.

A worker's busy share is the time in which its kernels compute, out of all time. A shard's load is the sum over its
replicas, so it says how many replicas would be busy all the time. Another replica is wanted while the average is above
``scale_up_at``; one less while the others would stay below ``scale_down_at`` without it. Between the two nothing
happens, and nothing at all before it has been so for the delay. Where ``max_workers`` leaves room for fewer than want
one, the busiest shard is first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config import ExpertScalingSettings


@dataclass(frozen=True)
class ShardLoad:
    """`wanted` replicas, of which `online` serve and are busy for so many seconds per second, all together."""

    wanted: int
    online: int
    busy: float

    @property
    def average(self) -> float:
        """Busy share of one replica."""
        return self.busy / self.online if self.online else 0.0


@dataclass(frozen=True)
class Change:
    """From now on a shard shall have so many replicas; why, in words."""

    replicas: int
    why: str


class ShardScaler:
    """`least` and `most` replicas of each shard; a shard that `most` leaves out has room for the settings' maximum."""

    def __init__(self, settings: ExpertScalingSettings, least: Mapping[int, int], most: Mapping[int, int]) -> None:
        assert settings.max_replicas is not None, "without it nothing is scaled"
        self._settings = settings
        self._least = dict(least)
        self._most = {shard: min(settings.max_replicas, most.get(shard, settings.max_replicas)) for shard in least}
        self._hot_since_s: dict[int, float] = {}
        self._cold_since_s: dict[int, float] = {}

    def decide(self, loads: Mapping[int, ShardLoad], now_s: float) -> dict[int, Change]:
        """The shards whose number of replicas changes now, by one each. Call it often; nothing else has a memory."""
        changes: dict[int, Change] = {}
        room = self._room(loads)
        for shard in sorted(loads, key=lambda shard: (-loads[shard].average, shard)):
            load = loads[shard]
            # What was asked for last is not there yet, or has not left: the figures do not speak of it.
            is_settled = load.online == load.wanted
            hot = is_settled and load.wanted < self._most[shard] and load.average > self._settings.scale_up_at
            cold = is_settled and load.wanted > self._least[shard] and self._would_stay_calm(load)
            if _lasts(self._hot_since_s, shard, hot, self._settings.upscale_delay_s, now_s) and room > 0:
                room -= 1
                changes[shard] = Change(load.wanted + 1, f"busy {load.average:.0%}")
            elif _lasts(self._cold_since_s, shard, cold, self._settings.downscale_delay_s, now_s):
                changes[shard] = Change(load.wanted - 1, f"busy {load.average:.0%}")
            if shard in changes:
                self._hot_since_s.pop(shard, None)
                self._cold_since_s.pop(shard, None)
        return changes

    def _room(self, loads: Mapping[int, ShardLoad]) -> int:
        wanted = sum(load.wanted for load in loads.values())
        return (self._settings.max_workers or wanted + len(loads)) - wanted

    def _would_stay_calm(self, load: ShardLoad) -> bool:
        return load.wanted > 1 and load.busy / (load.wanted - 1) < self._settings.scale_down_at


def _lasts(since_s: dict[int, float], shard: int, is_so: bool, delay_s: float, now_s: float) -> bool:
    """Whether it has been so for the delay; keeps since when."""
    if not is_so:
        since_s.pop(shard, None)
        return False
    return now_s - since_s.setdefault(shard, now_s) >= delay_s
