"""What people may ask of a running application, from the process that owns Ray: look, drain, scale, restart, check.

Serve keeps as many replicas of a deployment as it is told to, and chooses itself which to stop when there are too many:
the newest, but first of all those that are not running. So a certain worker is taken out by having it end, waiting
until Serve has noticed, and lowering the number then: what Serve stops is the substitute that it has just begun to
start (ray/serve/_private/deployment_scheduler.py, _get_replicas_to_stop).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.errors import ConfigError, SwitchyardError

Say = Callable[[str], None]

# The stages of cluster/rotation.py.
_ROTATION = {
    "spreading": "telling the workers to accept the next secret as well",
    "switching": "telling the engines to prove the next secret",
    "settled": "telling the workers to forget the former secret",
}

_CALL_TIMEOUT_S = 15.0
_POLL_S = 0.2
# A worker loads a shard: minutes from a slow disk. Leaving takes a drain and a health check of Serve's.
_START_LIMIT_S = 1800.0
_LEAVE_LIMIT_S = 120.0


class ActionFailed(SwitchyardError):
    """Something that was asked for did not come about in time."""


def _silent(_text: str) -> None:
    pass


def router_handle(app_name: str) -> Any:
    """The expert router's handle for the process that owns Ray. Raises what Serve raises while there is no router.

    Not by gRPC, as replicas call one another (ops/node_environment.py): its threads would outlive Ray in this process.
    """
    from ray import serve

    from deployments.app import ROUTER_NAME

    return serve.get_deployment_handle(ROUTER_NAME, app_name).options(_by_reference=True)


class Control:
    """Of one application. Methods block; ConfigError is the caller's mistake, SwitchyardError the cluster's."""

    def __init__(self, app_name: str) -> None:
        self._app = app_name

    def status(self) -> dict[str, Any]:
        """Registry.status() (cluster/registry.py) with "model" and "progress"."""
        status = dict(self._router("status"))
        del status["table"]
        return status

    def pulse(self, known: int, wait_s: float) -> int:
        """A number, as soon as it is not `known` because something has happened; after `wait_s` in any case."""
        return int(self._router("pulse", known, wait_s))

    def expert_load(self) -> list[list[int]]:
        """Tokens that each expert has computed: [layer][expert], growing until the router restarts."""
        return list(self._router("expert_load"))

    def nodes(self) -> list[dict[str, Any]]:
        """The machines: {"id", "name", "address", "alive", "cpus", "gpus", "memory_bytes"}."""
        import ray

        return [
            {
                "id": node["NodeID"],
                "name": node["NodeManagerHostname"],
                "address": node["NodeManagerAddress"],
                "alive": node["Alive"],
                "cpus": node["Resources"].get("CPU", 0.0),
                "gpus": node["Resources"].get("GPU", 0.0),
                "memory_bytes": node["Resources"].get("memory", 0.0),
            }
            for node in ray.nodes()
        ]

    def drain(self, worker: str, *, replace: bool = False, say: Say = _silent) -> None:
        """Take a worker out: it finishes what it took, takes nothing new and leaves.

        Its shard has one replica less afterwards; with `replace` it has a new one, ready before the old one leaves.
        Raises ConfigError for an unknown worker, and for the last replica of a shard without `replace`.
        """
        shard = self._shard_of(worker)
        count = shard["wanted"]
        if replace:
            if shard["most"] is not None and count >= shard["most"]:
                raise ConfigError(
                    f"{worker} cannot have a successor before it leaves: the layout has room for {shard['most']} "
                    f"replicas of shard {shard['id']}. Drain it without --replace, and `switchyard scale` the shard "
                    "again."
                )
            say(f"starting another replica of shard {shard['id']}")
            self._scale_to(shard["id"], count + 1, say)
        elif sum(r["state"] == "online" for r in shard["replicas"]) < 2 or count < 2:
            raise ConfigError(
                f"{worker} is the last replica of shard {shard['id']}: calls would wait for ever. Use --replace, or "
                f"`switchyard scale {shard['id']} --replicas 2` first."
            )
        running = self._running(shard["id"])
        self._router("note", "drain", worker, "asked for" + (", to be replaced" if replace else ""))
        self._router("retire", worker)
        say(f"{worker} takes nothing new and finishes what it has")
        self._wait(lambda: worker not in self._workers(), _LEAVE_LIMIT_S, f"{worker} has not left")
        self._wait(
            lambda: self._running(shard["id"]) < running, _LEAVE_LIMIT_S, f"Serve has not noticed that {worker} is gone"
        )
        left = count if replace else count - 1
        self._set_target(shard["id"], left)
        self._router("scale", shard["id"], left)
        say(f"{worker} has left")

    def scale(self, shard: int, replicas: int, *, say: Say = _silent) -> None:
        """Have so many replicas of a shard; returns when they are ONLINE, or when those too many have left."""
        self._router("scale", shard, replicas)  # refuses what cannot be
        self._scale_to(shard, replicas, say)

    def restart(self, workers: Sequence[str] = (), *, say: Say = _silent) -> None:
        """Replace workers (default: all), one after the other; each leaves when its successor is ready."""
        known = self._workers()
        for worker in workers:
            if worker not in known:
                raise ConfigError(f"there is no worker {worker}; `switchyard status` lists them")
        chosen = list(workers) or sorted(known)
        self._router("note", "restart", "workers", f"{len(chosen)}, one after the other")
        for number, worker in enumerate(chosen, 1):
            say(f"{number} of {len(chosen)}: {worker}")
            self.drain(worker, replace=True, say=say)

    def rotate_secret(self, *, say: Say = _silent) -> None:
        """Change the data plane's secret while requests go on; returns when the former one is worthless everywhere."""
        self._router("rotate_secret")
        said = ""

        def is_done() -> bool:
            nonlocal said
            secret = self._router("status")["secret"]
            if secret["stage"] != said:
                said = secret["stage"]
                say(_ROTATION[said])
            return said == "settled" and bool(secret["everywhere"])

        self._wait(is_done, _LEAVE_LIMIT_S, "the secret has not been changed everywhere")

    def check_integrity(self) -> list[dict[str, Any]]:
        """{"subject", "ok", "text"} of every worker and engine. Raises ActionFailed when an engine does not answer."""
        number = self._router("begin_check")
        found: list[dict[str, Any]] | None = None

        def is_done() -> bool:
            nonlocal found
            found = self._router("integrity", number)
            return found is not None

        self._wait(is_done, _CALL_TIMEOUT_S, "an engine has not checked itself")
        return found or []

    # -- inside ---------------------------------------------------------------------------------------------------

    def _router(self, method: str, *args: Any) -> Any:
        return getattr(router_handle(self._app), method).remote(*args).result(timeout_s=_CALL_TIMEOUT_S)

    def _shard_of(self, worker: str) -> dict[str, Any]:
        for shard in self.status()["shards"]:
            for replica in shard["replicas"]:
                if replica["id"] == worker and replica["state"] == "online":
                    if replica["role"] != "primary":
                        raise ConfigError(f"{worker} is a {replica['role']}, which comes and goes by itself")
                    return dict(shard)
        raise ConfigError(f"there is no worker {worker} that is online; `switchyard status` lists them")

    def _workers(self) -> list[str]:
        shards = self.status()["shards"]
        return [r["id"] for s in shards for r in s["replicas"] if r["state"] != "gone" and r["role"] == "primary"]

    def _scale_to(self, shard_id: int, replicas: int, say: Say) -> None:
        self._set_target(shard_id, replicas)
        said = -1

        def is_done() -> bool:
            nonlocal said
            shard = next(s for s in self.status()["shards"] if s["id"] == shard_id)
            online = sum(r["state"] == "online" and r["role"] == "primary" for r in shard["replicas"])
            if online != said:
                say(f"shard {shard_id}: {online} of {replicas} replicas online")
                said = online
            return online == replicas and self._running(shard_id) == replicas

        self._wait(is_done, _START_LIMIT_S, f"shard {shard_id} does not have {replicas} replicas")

    def _set_target(self, shard_id: int, replicas: int) -> None:
        import ray

        from deployments.targets import set_replicas

        ray.get(set_replicas(self._app, shard_id, replicas))

    def _running(self, shard_id: int) -> int:
        """Replicas of a shard that Serve takes for running."""
        from ray import serve

        from deployments.targets import experts_name

        deployment = serve.status().applications[self._app].deployments[experts_name(shard_id)]
        return int(deployment.replica_states.get("RUNNING", 0))

    def _wait(self, condition: Callable[[], bool], limit_s: float, failure: str) -> None:
        end_s = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > end_s:
                raise ActionFailed(f"{failure} after {limit_s:.0f} s; `switchyard events` says what happened")
            time.sleep(_POLL_S)
