"""Replicas by load: simulated shards, whose load is given and spreads evenly over whatever serves."""

import random
from dataclasses import replace

import pytest

from cluster.config import ExpertScalingSettings, parse_settings
from cluster.errors import ConfigError
from cluster.scaling import ShardLoad, ShardScaler

SETTINGS = ExpertScalingSettings(
    max_replicas=4, scale_up_at=0.7, scale_down_at=0.4, upscale_delay_s=10.0, downscale_delay_s=60.0
)


class Shards:
    """`wanted` replicas serve as soon as they are wanted, but for those of `late`."""

    def __init__(self, settings: ExpertScalingSettings, count: int = 1, most: dict[int, int] | None = None) -> None:
        self.wanted = dict.fromkeys(range(count), 1)
        self.late: set[int] = set()
        self.now_s = 0.0
        self.history: list[tuple[float, int, int]] = []
        self._scaler = ShardScaler(settings, dict(self.wanted), most or {})

    def run(self, seconds: int, *demand: float) -> None:
        """`demand`: busy replicas' worth of work for each shard."""
        for _ in range(seconds):
            self.now_s += 1.0
            for shard, change in self._scaler.decide(self._loads(demand), self.now_s).items():
                assert change.why
                self.wanted[shard] = change.replicas
                self.history.append((self.now_s, shard, change.replicas))

    def _loads(self, demand: tuple[float, ...]) -> dict[int, ShardLoad]:
        online = {shard: count - (shard in self.late) for shard, count in self.wanted.items()}
        return {
            shard: ShardLoad(self.wanted[shard], online[shard], min(demand[shard], online[shard])) for shard in online
        }


def test_a_busy_shard_grows_until_it_is_calm_and_shrinks_when_the_load_is_gone():
    shards = Shards(SETTINGS)
    shards.run(100, 1.9)
    assert shards.wanted == {0: 3} and [count for _, _, count in shards.history] == [2, 3]
    shards.run(500, 1.9)
    assert len(shards.history) == 2, "constant load, no changes"
    shards.run(200, 0.0)
    assert shards.wanted == {0: 1}
    assert [count for _, _, count in shards.history] == [2, 3, 2, 1]


def test_nothing_happens_before_the_delays():
    shards = Shards(SETTINGS)
    shards.run(10, 1.0)
    assert not shards.history
    shards.run(1, 1.0)
    assert shards.history == [(11.0, 0, 2)]
    shards.run(59, 0.0)
    shards.run(1, 1.5)  # busy for a moment
    shards.run(60, 0.0)
    assert len(shards.history) == 1
    shards.run(1, 0.0)
    assert shards.wanted == {0: 1}


def test_between_the_thresholds_nothing_happens():
    shards = Shards(SETTINGS)
    shards.run(11, 1.0)
    for demand in (0.85, 1.35):  # 0.42 and 0.68 of two; one would have 0.85
        shards.run(300, demand)
        assert shards.wanted == {0: 2}


def test_a_replica_that_is_still_loading_is_waited_for():
    shards = Shards(SETTINGS)
    shards.run(11, 3.0)
    shards.late = {0}
    shards.run(100, 3.0)
    assert shards.wanted == {0: 2}
    shards.late = set()
    shards.run(11, 3.0)
    assert shards.wanted == {0: 3}


def test_the_busiest_shard_gets_the_last_room():
    shards = Shards(replace(SETTINGS, max_workers=5), count=4)
    shards.run(12, 0.75, 0.8, 0.95, 0.1)
    assert shards.wanted == {0: 1, 1: 1, 2: 2, 3: 1}
    shards.run(100, 0.75, 0.8, 0.95, 0.1)
    assert sum(shards.wanted.values()) == 5


def test_a_layouts_room_is_kept_to():
    shards = Shards(SETTINGS, count=2, most={1: 2})
    shards.run(200, 9.0, 9.0)
    assert shards.wanted == {0: 4, 1: 2}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_load_is_limits_are_kept_and_changes_are_steps(seed):
    draw = random.Random(seed)
    shards = Shards(replace(SETTINGS, max_workers=8, upscale_delay_s=2.0, downscale_delay_s=5.0), count=4)
    counts = dict(shards.wanted)
    for _ in range(200):
        shards.late = {shard for shard in range(4) if draw.random() < 0.1}
        shards.run(draw.randrange(1, 8), *(draw.uniform(0, 3) for _ in range(4)))
        for _, shard, count in shards.history:
            assert abs(count - counts[shard]) == 1 and 1 <= count <= 4
            counts[shard] = count
        shards.history.clear()
        assert counts == shards.wanted and sum(counts.values()) <= 8


def test_settings_that_cannot_be_are_refused_by_name():
    def refused(**more: object) -> str:
        with pytest.raises(ConfigError) as error:
            parse_settings({"model": "m", **more})
        return str(error.value)

    experts = {"max_replicas": 2, "scale_up_at": 0.5, "scale_down_at": 0.5}
    assert "scale_down_at" in refused(autoscaling={"experts": experts})
    assert refused(replicas=3, autoscaling={"experts": {"max_replicas": 2}}).startswith("replicas: is 3")
    assert "max_workers: is 3" in refused(workers=4, autoscaling={"experts": {"max_replicas": 2, "max_workers": 3}})
    assert refused(engines=3, autoscaling={"engines": {"max_replicas": 2}}).startswith("engines: is 3")
    assert "min_replicas" in refused(autoscaling={"engines": {"min_replica": 0}})
    settings = parse_settings({"model": "m", "autoscaling": {"engines": {"max_replicas": 3, "min_replicas": 0}}})
    assert (settings.fewest_engines, settings.most_engines) == (0, 3)
    always = parse_settings({"model": "m", "engines": 2})
    assert (always.fewest_engines, always.most_engines) == (2, 2)
