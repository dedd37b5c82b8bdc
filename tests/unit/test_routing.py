"""Routing tables, placement and the plan made from them."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from cluster.errors import ConfigError, InvalidCall, InvalidTable
from cluster.placement import partition
from cluster.plan import Plan
from cluster.routing import Endpoint, Replica, ReplicaState, RoutingTable, Shard, host_id


def make_replica(name: str, shard_id: int = 0, state: ReplicaState = ReplicaState.ONLINE) -> Replica:
    return Replica(name, shard_id, Endpoint("host", "socket", "10.0.0.1", 7000), state, 4711, "node-1")


def make_table(num_shards: int = 3) -> RoutingTable:
    shards = partition(4, 8, num_shards)
    return RoutingTable(3, "model", 4, 8, shards, tuple(make_replica(f"r{s.shard_id}", s.shard_id) for s in shards))


@pytest.mark.parametrize("num_experts", range(1, 18))
def test_partition_is_even_complete_and_contiguous(num_experts):
    for num_shards in range(1, num_experts + 1):
        shards = partition(5, num_experts, num_shards)
        assert [e for s in shards for e in s.experts] == list(range(num_experts))
        sizes = [len(s.experts) for s in shards]
        assert len(sizes) == num_shards and max(sizes) - min(sizes) <= 1
        RoutingTable(0, "m", 5, num_experts, shards, ()).validate()


def test_partition_names_what_is_wrong():
    with pytest.raises(ConfigError, match="9 shards need at least 9 experts per layer; the model has 8"):
        partition(4, 8, 9)
    for bad in ((0, 8, 1), (4, 0, 1), (4, 8, 0)):
        with pytest.raises(ConfigError):
            partition(*bad)


def test_json_round_trip_and_new_versions():
    table = make_table()
    assert RoutingTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    drained = table.with_replica(make_replica("r1", 1, ReplicaState.DRAINING))
    assert drained.epoch == 4 and len(drained.replicas) == 3
    assert drained.without("r1").without("unknown").epoch == 6
    assert {r.replica_id for r in drained.without("r1").replicas} == {"r0", "r2"}


def mutations(value: object):
    """Every way to break one place of a JSON document: drop it, add to it, or give it another type."""
    if isinstance(value, dict):
        yield {**value, "extra": 1}
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            for changed in mutations(value[key]):
                yield {**value, key: changed}
    elif isinstance(value, list):
        yield {}
        if value:
            for changed in mutations(value[0]):
                yield [changed, *value[1:]]
    else:
        yield None
        yield [value]
        yield True if isinstance(value, int) and not isinstance(value, bool) else 7


def test_json_is_parsed_strictly():
    broken = list(mutations(make_table().to_json()))
    assert len(broken) > 60
    for data in [*broken, None, [], "table"]:
        with pytest.raises(InvalidTable):
            RoutingTable.from_json(data)


def test_tables_that_contradict_themselves():
    table, shard = make_table(1), Shard(0, tuple(range(8)), 0, 4)
    for bad in (
        replace(table, epoch=-1),
        replace(table, num_experts=9),
        replace(table, num_layers=5),
        replace(table, shards=()),
        replace(table, shards=(shard, shard)),
        replace(table, shards=(shard, replace(shard, shard_id=1))),
        replace(table, shards=(replace(shard, experts=(0, 0, 1, 2, 3, 4, 5, 6)),)),
        replace(table, shards=(replace(shard, end_layer=5),)),
        replace(table, shards=(replace(shard, end_layer=2), Shard(1, tuple(range(7)), 2, 4))),
        replace(table, replicas=(make_replica("a"), make_replica("a"))),
        replace(table, replicas=(make_replica("a", 9),)),
        replace(table, shards=(replace(shard, experts=(*range(7), -1)),)),
    ):
        with pytest.raises(InvalidTable):
            bad.validate()
    with pytest.raises(InvalidTable, match="unknown replica state"):
        data = table.to_json()
        data["replicas"][0]["state"] = "resting"
        RoutingTable.from_json(data)


def test_host_id_is_stable():
    assert host_id() == host_id() and len(host_id()) > 36


def test_plan_sends_every_choice_to_its_holder_once():
    shards = (Shard(0, (5, 1), 0, 4), Shard(1, (0, 2, 3), 0, 4), Shard(2, (7, 6, 4), 0, 4))
    plan = Plan(RoutingTable(1, "m", 4, 8, shards, ()))
    assert len({id(p) for p in plan.layers}) == 1 and plan.layers[0].whole is None
    rng = np.random.default_rng(0)
    for num_tokens in (1, 2, 9):
        ids_TK = rng.integers(-1, 8, (num_tokens, 3)).astype(np.int64)
        seen_TK = np.full_like(ids_TK, -1)
        for route, rows, local_ids in plan.layers[0].split(ids_TK):
            where = np.arange(num_tokens) if rows is None else rows
            assert (local_ids.max(1) >= 0).all() and local_ids.dtype == np.int32
            for row, locals_K in zip(where, local_ids, strict=True):
                for k, local in enumerate(locals_K):
                    if local >= 0:
                        assert seen_TK[row, k] == -1
                        seen_TK[row, k] = route.shard.experts[local]
        assert (seen_TK == ids_TK).all()
    for bad in (-2, 8, 2**40):
        with pytest.raises(InvalidCall):
            plan.layers[0].split(np.array([[0, bad, 1]]))


def test_plan_knows_when_one_shard_holds_everything():
    ordered = Plan(RoutingTable(1, "m", 2, 4, partition(2, 4, 1), ()))
    assert ordered.layers[1].whole is ordered.routes[0]
    permuted = Plan(RoutingTable(1, "m", 2, 4, (Shard(0, (1, 0, 2, 3), 0, 2),), ()))
    assert permuted.layers[0].whole is None


class FakeLink:
    def __init__(self, outstanding_tokens: int, idle: bool = True) -> None:
        self.outstanding_tokens = outstanding_tokens
        self.free = [object()] if idle else []
        self.is_stuck = False


def test_replica_choice_prefers_the_less_loaded_of_two():
    route = Plan(RoutingTable(1, "m", 1, 4, partition(1, 4, 1), ())).routes[0]
    assert route.choose() is None
    a, b, busy = FakeLink(100), FakeLink(1), FakeLink(0, idle=False)
    route.links = [a, b]
    assert all(route.choose() is b for _ in range(20))
    assert route.choose({b}) is a and route.choose({a, b}) is None
    route.links = [busy]
    assert route.choose() is None
    route.links = [a, busy]
    assert route.choose() is a
    random.seed(1)
    route.links = [FakeLink(i) for i in range(5)]
    counts = [0] * 5
    for _ in range(2000):
        counts[route.choose().outstanding_tokens] += 1
    assert counts == sorted(counts, reverse=True) and counts[4] == 0 and counts[3] > 0
