"""Membership: states, epochs and completeness as a function of calls and an injected clock."""

import pytest

from cluster.errors import ConfigError, InvalidTable
from cluster.membership import FORGET_AFTER_S, Membership
from cluster.placement import partition
from cluster.routing import Endpoint, Replica, ReplicaState, RoutingTable


def make_membership(epoch: int = 100) -> Membership:
    table = RoutingTable(epoch, "model-a", 2, 4, partition(2, 4, 2), ())
    return Membership(table, lost_after_s=5.0)


def make_replica(name: str, shard_id: int) -> Replica:
    return Replica(name, shard_id, Endpoint("host", f"sock-{name}", "127.0.0.1", 1), ReplicaState.ONLINE, 1, "node")


def states(membership: Membership) -> dict[str, ReplicaState]:
    return {replica.replica_id: replica.state for replica in membership.table.replicas}


def test_complete_only_when_every_shard_has_a_replica():
    membership = make_membership()
    assert membership.missing_shards == (0, 1)
    membership.register(make_replica("a", 0), "model-a", 0.0)
    assert membership.missing_shards == (1,)
    membership.register(make_replica("b", 1), "model-a", 0.0)
    assert membership.missing_shards == ()


def test_a_silent_replica_is_gone_and_has_to_register_again():
    membership = make_membership()
    membership.register(make_replica("a", 0), "model-a", 0.0)
    membership.register(make_replica("b", 1), "model-a", 0.0)
    assert membership.heartbeat("a", 5.0)
    assert membership.expire(5.5) == ("b",)
    assert states(membership) == {"a": ReplicaState.ONLINE, "b": ReplicaState.GONE}
    assert membership.missing_shards == (1,)
    assert not membership.heartbeat("b", 6.0)
    membership.register(make_replica("b", 1), "model-a", 6.0)
    assert membership.missing_shards == ()
    assert membership.expire(6.5) == ()


def test_long_gone_replicas_are_forgotten():
    membership = make_membership()
    membership.register(make_replica("a", 0), "model-a", 0.0)
    assert membership.expire(6.0) == ("a",)
    assert membership.expire(FORGET_AFTER_S + 1) == ()
    assert states(membership) == {}
    assert not membership.heartbeat("a", FORGET_AFTER_S + 2)


def test_every_change_raises_the_epoch_and_nothing_else_does():
    membership = make_membership(epoch=7)
    epochs = [membership.table.epoch]
    for change in (
        lambda: membership.register(make_replica("a", 0), "model-a", 0.0),
        lambda: membership.drain("a"),
        lambda: membership.leave("a"),
    ):
        change()
        epochs.append(membership.table.epoch)
    assert epochs == sorted(set(epochs))
    before = membership.table
    membership.drain("unknown")
    membership.leave("unknown")
    membership.expire(100.0)
    assert membership.table is before


def test_a_draining_replica_does_not_count():
    membership = make_membership()
    membership.register(make_replica("a", 0), "model-a", 0.0)
    membership.register(make_replica("b", 1), "model-a", 0.0)
    membership.drain("a")
    assert membership.missing_shards == (0,)
    assert membership.heartbeat("a", 1.0)


def test_a_worker_of_another_model_or_shard_is_refused():
    membership = make_membership()
    with pytest.raises(ConfigError, match="same checkpoint"):
        membership.register(make_replica("a", 0), "model-b", 0.0)
    with pytest.raises(InvalidTable):
        membership.register(make_replica("a", 9), "model-a", 0.0)
    assert membership.table.replicas == ()
