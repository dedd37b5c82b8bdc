"""The expert router as a real Serve deployment: what workers and engines see of it, also when it dies."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import ConfigError
from cluster.routing import Endpoint, Replica, ReplicaState, RoutingTable
from tests.serving import wait_until

pytestmark = pytest.mark.timeout(120)

ARGS = {"model": "m", "workers": 2, "worker_lost_after_s": 1.5}
APP = "router-test"


class Router:
    """A handle with plain calls."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __call__(self, method: str, *args: Any) -> Any:
        return getattr(self._handle, method).remote(*args).result(timeout_s=30)

    def table(self, known_epoch: int = 0) -> RoutingTable:
        return RoutingTable.from_json(self("wait_for_table", known_epoch))


@pytest.fixture
def router(ray_cluster: None) -> Iterator[Router]:
    from ray import serve

    from deployments.expert_router import ExpertRouter

    deployment = serve.deployment(
        ExpertRouter, name="expert-router", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100
    )
    yield Router(serve.run(deployment.bind(ARGS, "fingerprint", 3, 4), name=APP, route_prefix=None))
    serve.delete(APP)


def replica(name: str, shard_id: int) -> Replica:
    return Replica(name, shard_id, Endpoint("host", name, "127.0.0.1", 1), ReplicaState.ONLINE, 1, "node")


def register_all(router: Router) -> None:
    for shard_id in range(2):
        router("register", replica(f"worker-{shard_id}", shard_id), "fingerprint")


def test_engines_get_the_first_table_when_every_shard_has_a_worker(router):
    router("register", replica("worker-0", 0), "fingerprint")
    waiting = router._handle.wait_for_table.remote(0)
    with pytest.raises(TimeoutError):
        waiting.result(timeout_s=1)
    assert router("status")["missing_shards"] == [1]
    router("register", replica("worker-1", 1), "fingerprint")
    table = RoutingTable.from_json(waiting.result(timeout_s=10))
    assert {each.replica_id for each in table.replicas} == {"worker-0", "worker-1"}
    assert [shard.experts for shard in table.shards] == [(0, 1), (2, 3)]


def test_a_worker_that_falls_silent_is_gone_until_it_registers_again(router):
    register_all(router)
    first = router.table()
    kept_alive_until_s = time.monotonic() + 3
    while time.monotonic() < kept_alive_until_s:
        assert router("heartbeat", "worker-0") == "ok"
        time.sleep(0.2)
    table = router.table(first.epoch)
    assert {each.replica_id: each.state for each in table.replicas} == {
        "worker-0": ReplicaState.ONLINE,
        "worker-1": ReplicaState.GONE,
    }
    assert router("heartbeat", "worker-1") == "register"
    router("register", replica("worker-1", 1), "fingerprint")
    assert router.table(table.epoch).epoch > table.epoch
    assert router("status")["missing_shards"] == []


def test_drain_and_leave_reach_the_engines(router):
    register_all(router)
    table = router.table()
    router("drain", "worker-0")
    table = router.table(table.epoch)
    assert {each.state for each in table.replicas} == {ReplicaState.ONLINE, ReplicaState.DRAINING}
    router("leave", "worker-0")
    assert [each.replica_id for each in router.table(table.epoch).replicas] == ["worker-1"]


def test_a_worker_of_another_model_is_refused(router):
    with pytest.raises(ConfigError, match="same checkpoint"):
        router("register", replica("worker-0", 0), "another")


def test_a_new_router_keeps_the_secret_and_raises_the_epoch(router):
    """The router dies: Serve starts another, which no engine mistakes for an older one."""
    import ray

    secrets = router("secrets")
    register_all(router)
    table = router.table()
    actor = next(
        ray.get_actor(each["name"], namespace=each["namespace"])
        for each in ray.util.list_named_actors(all_namespaces=True)
        if "expert-router" in each["name"]
    )
    ray.kill(actor, no_restart=False)

    def is_back() -> bool:
        try:
            return router("status")["missing_shards"] == [0, 1]
        except ray.exceptions.RayError:
            return False

    wait_until(is_back, "the router is back")
    assert router("secrets") == secrets
    assert router("heartbeat", "worker-0") == "register"
    register_all(router)
    assert router.table(table.epoch).epoch > table.epoch
