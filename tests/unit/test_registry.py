"""What the expert router decides: blame, spares, restarts of itself, and what it tells people; with a clock of ours."""

import pytest

from cluster.blame import Cause
from cluster.errors import ConfigError, InvalidTable
from cluster.placement import partition
from cluster.registry import Answer, Registry, SpareState
from cluster.routing import Endpoint, Replica, ReplicaState, Role, RoutingTable

LOST_AFTER_S = 5.0


class Cluster:
    """A registry of two shards, and workers that beat when they are told to."""

    def __init__(self, replicas: int = 1, epoch: int = 100) -> None:
        table = RoutingTable(epoch, "model-a", 2, 4, partition(2, 4, 2), ())
        self.registry = Registry(table, LOST_AFTER_S, {0: replicas, 1: replicas}, now_s=0.0, wall_s=1e9)
        for shard in range(2):
            for number in range(replicas):
                self.register(f"w{shard}{number}", shard, 0.0)

    def register(self, name: str, shard: int, now_s: float, role: Role = Role.PRIMARY) -> None:
        endpoint = Endpoint("host", name, "127.0.0.1", 1)
        replica = Replica(name, shard, endpoint, ReplicaState.ONLINE, 7, "node", role)
        self.registry.register(replica, "model-a", 1000, now_s)

    def states(self) -> dict[str, str]:
        return {replica.replica_id: replica.state.value for replica in self.registry.table.replicas}

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.registry.status(0.0)["events"]]


def test_a_lost_last_worker_is_news_and_so_is_its_return():
    cluster = Cluster()
    assert "shard_missing" not in cluster.kinds(), "before the start nothing is missing"
    cluster.registry.leave("w00", "its process ended with status -9", 1.0)
    assert cluster.registry.missing_shards == (0,)
    cluster.register("w09", 0, 3.0)
    assert cluster.kinds()[-4:] == ["worker_lost", "shard_missing", "worker_online", "shard_back"]
    event = cluster.registry.status(3.0)["events"][-4]
    assert event == {"time_s": 1e9 + 1, "kind": "worker_lost", "subject": "w00", "text": event["text"]}
    assert "status -9" in event["text"]


def test_a_silent_worker_is_lost_after_a_while_and_must_register_again():
    cluster = Cluster()
    for now_s in (2.0, 4.0, 6.0):
        assert cluster.registry.heartbeat("w10", {"tokens_per_s": 3.0}, now_s) is Answer.OK
        cluster.registry.tick(now_s)
    assert cluster.states() == {"w00": "gone", "w10": "online"}
    assert cluster.registry.heartbeat("w00", {}, 6.5) is Answer.REGISTER
    replica = cluster.registry.status(7.0)["shards"][1]["replicas"][0]
    assert replica["load"] == {"tokens_per_s": 3.0} and replica["age_s"] == 7.0 and replica["memory_bytes"] == 1000


def test_a_retired_worker_drains_and_is_told_to_leave():
    cluster = Cluster(replicas=2)
    cluster.registry.retire("w00", 1.0)
    assert cluster.states()["w00"] == "draining"
    assert cluster.registry.heartbeat("w00", {}, 1.5) is Answer.LEAVE
    assert cluster.registry.heartbeat("w01", {}, 1.5) is Answer.OK
    cluster.registry.leave("w00", "drained", 2.0)
    assert "w00" not in cluster.states()
    assert cluster.kinds()[-2:] == ["worker_draining", "worker_left"]
    with pytest.raises(ConfigError, match="there is no worker w00"):
        cluster.registry.retire("w00", 3.0)


@pytest.mark.parametrize(
    ("cause", "times"), [(Cause.REFUSED, 1), (Cause.WRONG_SECRET, 1), (Cause.MALFORMED, 3), (Cause.NOT_FINITE, 3)]
)
def test_accusations_that_add_up_condemn_a_worker(cause, times):
    cluster = Cluster(replicas=2)
    for number in range(times):
        assert cluster.states()["w00"] == "online"
        cluster.registry.accused("engine-1", "w00", cause, 1.0 + number)
    assert cluster.states() == {"w00": "draining", "w01": "online", "w10": "online", "w11": "online"}
    assert cluster.registry.heartbeat("w00", {}, 9.0) is Answer.RESTART
    cluster.registry.accused("engine-1", "w00", cause, 9.0)
    assert cluster.kinds().count("worker_blamed") == 1


def test_the_last_of_a_shard_is_kept_while_others_are_on_their_way():
    cluster = Cluster(replicas=2)
    cluster.registry.leave("w01", "died", 0.5)
    for now_s in (1.0, 2.0, 3.0):
        cluster.registry.accused("engine-1", "w00", Cause.NOT_FINITE, now_s)
    assert cluster.states()["w00"] == "online" and "blame_ignored" in cluster.kinds()
    cluster.register("w02", 0, 4.0)
    cluster.registry.accused("engine-1", "w00", Cause.NOT_FINITE, 5.0)
    assert cluster.states()["w00"] == "draining"
    alone = Cluster()
    for now_s in (1.0, 2.0, 3.0):
        alone.registry.accused("engine-1", "w00", Cause.NOT_FINITE, now_s)
    assert alone.states()["w00"] == "draining", "a restart is its cure, and calls wait"


def test_silence_alone_and_old_accusations_condemn_nobody():
    cluster = Cluster(replicas=2)
    for now_s in range(50):
        cluster.registry.accused("engine-1", "w00", Cause.SILENT, float(now_s))
        cluster.registry.heartbeat("w00", {}, float(now_s))
    for now_s in (100.0, 170.0, 240.0, 310.0):
        cluster.registry.accused("engine-1", "w01", Cause.MALFORMED, now_s)
    assert set(cluster.states().values()) == {"online"}
    cluster.registry.accused("engine-1", "nobody", Cause.REFUSED, 311.0)


def test_an_engine_that_accuses_most_workers_is_itself_to_blame():
    cluster = Cluster(replicas=2)
    cluster.registry.accused("engine-1", "w00", Cause.REFUSED, 1.0)
    for name in ("w01", "w10", "w11"):
        cluster.registry.accused("engine-1", name, Cause.REFUSED, 1.0)
    draining = [name for name, state in cluster.states().items() if state == "draining"]
    assert draining == ["w00", "w01"], "of four, half were believed"
    assert cluster.kinds().count("engine_blamed") == 2


def test_a_restarted_router_keeps_quiet_until_its_workers_are_back_and_never_goes_back():
    table = RoutingTable(50, "model-a", 2, 4, partition(2, 4, 2), ())
    cluster = Cluster()
    cluster.registry = registry = Registry(table, LOST_AFTER_S, {0: 1, 1: 1}, now_s=0.0, wall_s=1e9)
    assert registry.news_for(200, 0.5) is None
    assert registry.table.epoch == 201, "an engine has seen 200"
    cluster.register("w00", 0, 1.0)
    assert registry.news_for(200, 1.0) is None, "w10 serves, though it has not registered yet"
    cluster.register("w10", 1, 1.2)
    assert registry.news_for(200, 1.2).epoch > 200
    registry.leave("w10", "died", 2.0)
    news = registry.news_for(203, 2.0)
    assert [r.replica_id for r in news.replicas] == ["w00"], "complete once: every change is news"


def test_a_restarted_router_does_not_wait_for_ever_for_the_dead():
    table = RoutingTable(50, "model-a", 2, 4, partition(2, 4, 2), ())
    registry = Registry(table, LOST_AFTER_S, {0: 1, 1: 1}, now_s=0.0, wall_s=1e9)
    assert registry.news_for(10, LOST_AFTER_S) is None
    assert registry.news_for(10, LOST_AFTER_S + 0.1) is not None
    assert registry.news_for(0, LOST_AFTER_S + 0.1) is None, "the first table of an engine is complete"


def test_a_spare_adopts_a_lost_shard_and_is_released_when_its_worker_is_back():
    cluster = Cluster()
    registry = cluster.registry
    registry.spare_reports("spare-1", 99, "node", None, 0.0)
    assert registry.spare_order("spare-1", 0.5) == (SpareState.READY, None)
    registry.leave("w10", "died", 1.0)
    assert registry.spare_order("spare-1", 1.0) == (SpareState.ADOPTING, 1)
    cluster.register("spare-1", 1, 2.0, Role.SPARE)
    assert registry.missing_shards == ()
    assert registry.status(2.0)["spares"] == [
        {"id": "spare-1", "pid": 99, "node": "node", "state": "serving", "shard": 1}
    ]
    cluster.register("w19", 1, 4.0)
    registry.spare_order("spare-1", 4.0)
    registry.tick(5.0)
    assert registry.spare_order("spare-1", 5.0) == (SpareState.SERVING, 1), "the worker may fall again"
    for name in ("w00", "w19", "spare-1"):
        registry.heartbeat(name, {}, 6.5)
    registry.tick(6.5)
    assert registry.spare_order("spare-1", 6.5) == (SpareState.RELEASED, 1)
    assert cluster.states()["spare-1"] == "draining"
    registry.spare_left("spare-1", 7.0)
    assert "spare-1" not in cluster.states() and registry.spare_order("spare-1", 7.0) is None


def test_a_forgotten_spare_that_serves_says_so_and_is_released_all_the_same():
    cluster = Cluster()
    registry = cluster.registry
    registry.spare_reports("spare-1", 99, "node", None, 0.0)
    registry.leave("w10", "died", 1.0)
    now_s = LOST_AFTER_S + 1.0
    registry.tick(now_s)
    assert registry.spare_order("spare-1", now_s) is None, "it was silent while it loaded"
    registry.spare_reports("spare-1", 99, "node", 1, now_s)
    assert registry.spare_order("spare-1", now_s) == (SpareState.ADOPTING, 1)
    cluster.register("spare-1", 1, now_s, Role.SPARE)
    now_s += LOST_AFTER_S + 1.0
    registry.heartbeat("spare-1", {}, now_s)
    registry.tick(now_s)
    assert registry.spare_order("spare-1", now_s) is None
    registry.spare_reports("spare-1", 99, "node", 1, now_s)
    assert registry.spare_order("spare-1", now_s) == (SpareState.SERVING, 1)
    cluster.register("w19", 1, now_s)
    for _ in range(3):
        now_s += 1.0
        assert registry.heartbeat("w19", {}, now_s) is registry.heartbeat("spare-1", {}, now_s) is Answer.OK
        registry.spare_order("spare-1", now_s)
        registry.tick(now_s)
    assert registry.spare_order("spare-1", now_s) == (SpareState.RELEASED, 1)
    assert cluster.states()["spare-1"] == "draining"


def test_spares_are_kept_for_shards_that_have_nobody():
    cluster = Cluster(replicas=2)
    registry = cluster.registry
    registry.spare_reports("spare-1", 1, "node", None, 0.0)
    registry.leave("w00", "died", 1.0)
    assert registry.spare_order("spare-1", 1.0) == (SpareState.READY, None)
    registry.leave("w01", "died", 1.1)
    registry.leave("w10", "died", 1.2)
    registry.leave("w11", "died", 1.3)
    assert registry.spare_order("spare-1", 1.4) == (SpareState.ADOPTING, 0)
    registry.spare_reports("spare-2", 2, "node", None, 1.5)
    assert registry.spare_order("spare-2", 1.5) == (SpareState.ADOPTING, 1)
    registry.tick(1.5 + LOST_AFTER_S + 0.1)
    assert registry.status(9.0)["spares"] == [], "silent spares are forgotten"


def test_a_shadow_keeps_a_shard_from_being_missing():
    cluster = Cluster()
    cluster.register("shadow-0", 0, 0.0, Role.SHADOW)
    cluster.registry.leave("w00", "died", 1.0)
    assert cluster.registry.missing_shards == ()


def test_engines_come_stall_go_and_are_lost():
    cluster = Cluster()
    registry = cluster.registry
    for now_s, state in ((0.0, "starting"), (1.0, "ready"), (2.0, "stalled"), (3.0, "ready")):
        assert registry.engine_heartbeat("engine-1", 5, "node", state, now_s) == 0
    assert [e["state"] for e in registry.status(3.0)["engines"]] == ["ready"]
    registry.tick(3.0 + LOST_AFTER_S + 0.1)
    assert registry.status(9.0)["engines"] == []
    engine_kinds = [kind for kind in cluster.kinds() if kind.startswith(("engine", "stall"))]
    assert engine_kinds == ["engine_started", "engine_ready", "stall_began", "stall_ended", "engine_lost"]
    registry.engine_heartbeat("engine-2", 6, "node", "ready", 10.0)
    registry.engine_left("engine-2", "stopped", 11.0, is_lost=False)
    registry.engine_left("engine-2", "no heartbeat", 12.0, is_lost=True)
    assert cluster.kinds()[-1] == "engine_left"


def test_what_happens_is_told_from_what_only_varies():
    cluster = Cluster(replicas=2)
    registry = cluster.registry
    seen = [registry.what_happened()]
    registry.heartbeat("w00", {"tokens": 5}, 1.0)
    registry.tick(1.0)
    assert registry.what_happened() == seen[0]
    for happen in (
        lambda: registry.engine_heartbeat("e", 1, "node", "starting", 1.0),
        lambda: registry.engine_heartbeat("e", 1, "node", "stalled", 1.1),
        lambda: registry.spare_reports("s", 9, "node", None, 1.2),
        lambda: registry.leave("w00", "it ended", 1.3),
        lambda: registry.scale(1, 3, 1.4),
        lambda: registry.note("drain", "w01", "asked for", 1.5),
    ):
        happen()
        assert registry.what_happened() not in seen
        seen.append(registry.what_happened())


def test_integrity_is_known_when_every_engine_has_looked():
    cluster = Cluster()
    registry = cluster.registry
    registry.engine_heartbeat("engine-1", 5, "node", "ready", 0.0)
    registry.heartbeat("w00", {"fault": "3 messages taken, 2 answered"}, 0.5)
    number = registry.begin_check()
    assert registry.integrity(number) is None
    assert registry.engine_heartbeat("engine-1", 5, "node", "ready", 1.0) == number
    registry.engine_checked("engine-1", number, "")
    found = {each["subject"]: (each["ok"], each["text"]) for each in registry.integrity(number)}
    assert found == {"engine-1": (True, ""), "w00": (False, "3 messages taken, 2 answered"), "w10": (True, "")}


def test_scaling_is_checked_and_remembered():
    cluster = Cluster()
    cluster.registry.scale(1, 3, 1.0)
    assert dict(cluster.registry.wanted) == {0: 1, 1: 3}
    assert cluster.registry.status(1.0)["shards"][1]["wanted"] == 3
    for shard, replicas in ((2, 1), (0, 0)):
        with pytest.raises(ConfigError):
            cluster.registry.scale(shard, replicas, 2.0)


def test_strangers_are_refused_and_noted():
    cluster = Cluster()
    replica = Replica("x", 0, Endpoint("h", "x", "127.0.0.1", 1), ReplicaState.ONLINE, 1, "node")
    with pytest.raises(ConfigError, match="holds model other"):
        cluster.registry.register(replica, "other", 0, 1.0)
    with pytest.raises(InvalidTable):
        cluster.register("y", 9, 1.0)
    assert set(cluster.states()) == {"w00", "w10"}
    assert "worker_refused" in cluster.kinds()
