"""The expert router: owns the routing table and the cluster's secret. No token ever passes through it.

What it knows and decides is cluster/registry.py's; here it gets a clock and callers. Workers, spares and engines send
heartbeats; engines wait for tables newer than the one they know. When the router dies, tables stay as they are; the new
router starts with a larger epoch, and everybody registers again.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.experimental import internal_kv

from cluster.blame import Cause
from cluster.config import parse_settings, to_args
from cluster.expert_load import ExpertLoad
from cluster.inventory import NODE_LABEL
from cluster.layout import most_replicas, replicas_of, shards_of
from cluster.readings import readings
from cluster.registry import Registry, SpareState
from cluster.rotation import SECRET_BYTES, Rotation, Secrets
from cluster.routing import Replica, ReplicaState, RoutingTable
from cluster.scaling import ShardScaler
from cluster.telemetry import Telemetry
from deployments.engine_metrics import version
from deployments.ray_metrics import RayMetrics
from deployments.targets import set_replicas

logger = logging.getLogger("ray.serve")

_SECRETS_KEY = b"switchyard:data-plane-secrets"
_WANTED_KEY = b"switchyard:wanted-replicas"
_TICK_S = 0.25
_SCALE_EVERY_S = 1.0
_LONG_POLL_S = 20.0
_SPARE_POLL_S = 1.0
_NAMES_HOLD_S = 10.0  # a node that has joined has its name in status() after that
_SCRAPE_LIMIT_S = 2.0
_TELL_RAY_EVERY_S = 10.0


class ExpertRouter:
    """One replica per application. Method arguments and results travel by Ray, not by the data plane."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: dict[str, Any], model_fingerprint: str, num_layers: int, num_experts: int, deployed: str = ""
    ) -> None:
        """`deployed` names what build_app has built: a router that is restarted has the same, one deployed anew not."""
        settings = parse_settings(args)
        self._model = settings.name
        self._layout = to_args(settings)["layout"]
        shards = shards_of(settings, num_layers, num_experts)
        # Wall-clock milliseconds: a restarted router does not reuse an epoch that engines have already seen.
        epoch = int(time.time() * 1000)
        table = RoutingTable(epoch, model_fingerprint, num_layers, num_experts, shards, ())
        wanted = replicas_of(settings, len(shards)) | _wanted_before(deployed)
        self._registry = Registry(
            table, settings.worker_lost_after_s, wanted, time.monotonic(), time.time(), most_replicas(settings)
        )
        self._app, self._deployed = serve.get_replica_context().app_name, deployed
        self._experts = ExpertLoad(table)
        self._telemetry = Telemetry(self._experts)
        self._changed = asyncio.Condition()
        self._happened: tuple[Any, ...] = ()
        self._pulses = 0
        self._node_names: Mapping[str, str] = {}
        self._named_s = float("-inf")
        self._rotation = Rotation(_shared_secrets())
        # Until then a restarted router does not know all who live, and must not take them for ready.
        self._may_rotate_s = time.monotonic() + 2 * settings.worker_lost_after_s
        self._progress: dict[str, str] = {}
        self._ticking = asyncio.create_task(self._tick())
        if settings.autoscaling.experts.max_replicas is not None:
            least = replicas_of(settings, len(shards))
            scaler = ShardScaler(settings.autoscaling.experts, least, most_replicas(settings))
            self._scaling = asyncio.create_task(self._scale_by_load(scaler))
        if settings.metrics:
            self._to_ray = asyncio.create_task(self._tell_ray())

    # -- the data plane's secret ----------------------------------------------------------------------------------

    async def secrets(self) -> Secrets:
        """What proves membership on the data plane now."""
        return self._rotation.now

    async def next_secrets(self, member_id: str, held_serial: int) -> Secrets | None:
        """A worker or engine that holds that step gets the next one as soon as there is one; None after 20 s."""
        self._rotation.holds(member_id, held_serial)
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._rotation.now.serial != held_serial), _LONG_POLL_S
                )
        return self._rotation.now if self._rotation.now.serial != held_serial else None

    async def rotate_secret(self) -> None:
        """Change the secret; status() says how far that is. Raises ConfigError while it is being changed."""
        self._rotation.begin(os.urandom(SECRET_BYTES))
        await self._secrets_changed()

    async def _secrets_changed(self) -> None:
        now = self._rotation.now
        internal_kv._internal_kv_put(_SECRETS_KEY, now.to_json().encode(), overwrite=True)
        self._registry.note("secret", "data plane", f"{now.stage} (step {now.serial})", time.monotonic())
        await self._notify()

    # -- workers --------------------------------------------------------------------------------------------------

    async def register(self, replica: Replica, model_fingerprint: str, memory_bytes: int = 0, device: str = "") -> None:
        """A worker is ready to serve, on a device in words. Raises ConfigError when it holds another model."""
        self._registry.register(replica, model_fingerprint, memory_bytes, time.monotonic(), device)
        await self._notify()

    async def heartbeat(
        self, replica_id: str, load: dict[str, Any] | None = None, metrics: dict[str, Any] | None = None
    ) -> str:
        """The value of a registry.Answer: ok, register (again), or leave.

        `load` and `metrics` are what the worker process answers to these commands (model/worker_main.py).
        """
        load = dict(load or {})
        expert_tokens = load.pop("expert_tokens", None)
        answer = self._registry.heartbeat(replica_id, load, time.monotonic())
        replica = self._registry.replica(replica_id)
        if replica is not None and expert_tokens is not None:
            self._experts.report(replica, expert_tokens)
        if replica is not None and metrics is not None:
            self._telemetry.worker_reports(replica_id, metrics)
        return answer.value

    async def drain(self, replica_id: str) -> None:
        """The worker is about to leave, or somebody wants it to take nothing new."""
        self._registry.drain(replica_id, time.monotonic())
        await self._notify()

    async def retire(self, replica_id: str) -> None:
        """Have a worker drain and end. Raises ConfigError for an unknown one."""
        self._registry.retire(replica_id, time.monotonic())
        await self._notify()

    async def leave(self, replica_id: str, why: str = "stopped") -> None:
        """A worker has ended."""
        self._registry.leave(replica_id, why, time.monotonic())
        await self._notify()

    # -- spares ---------------------------------------------------------------------------------------------------

    async def spare_reports(self, spare_id: str, pid: int, node: str, shard_id: int | None) -> None:
        """A spare can adopt a shard, or has adopted `shard_id`."""
        self._registry.spare_reports(spare_id, pid, node, shard_id, time.monotonic())
        await self._notify()

    async def spare_order(self, spare_id: str, known: str) -> tuple[str, int | None] | None:
        """(state, shard) as soon as the state is not `known`, else what it is after a second; None: report again."""

        def order() -> tuple[SpareState, int | None] | None:
            return self._registry.spare_order(spare_id, time.monotonic())

        async with self._changed:
            is_news = self._changed.wait_for(lambda: (now := order()) is None or now[0].value != known)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_news, _SPARE_POLL_S)
            now = order()
        return (now[0].value, now[1]) if now is not None else None

    async def spare_left(self, spare_id: str) -> None:
        """A spare has ended."""
        self._registry.spare_left(spare_id, time.monotonic())
        await self._notify()

    # -- engines --------------------------------------------------------------------------------------------------

    async def wait_for_table(self, known_epoch: int) -> dict[str, Any] | None:
        """The table as JSON as soon as it is newer than `known_epoch` and was complete once; None after 20 s."""
        async with self._changed:
            is_news = self._changed.wait_for(lambda: self._news(known_epoch) is not None)
            try:
                await asyncio.wait_for(is_news, _LONG_POLL_S)
            except TimeoutError:
                return None
            table = self._news(known_epoch)
            return table.to_json() if table is not None else None

    def _news(self, known_epoch: int) -> RoutingTable | None:
        return self._registry.news_for(known_epoch, time.monotonic())

    async def engine_heartbeat(
        self, engine_id: str, pid: int, node: str, state: str, load: dict[str, Any] | None = None
    ) -> int:
        """An engine lives; `state` is starting, ready or stalled. Returns the newest integrity check's number."""
        return self._registry.engine_heartbeat(engine_id, pid, node, state, time.monotonic(), load)

    async def engine_checked(self, engine_id: str, number: int, fault: str) -> None:
        """An engine has done that integrity check; `fault` is empty when all is well."""
        self._registry.engine_checked(engine_id, number, fault)

    async def engine_left(self, engine_id: str, why: str, is_lost: bool) -> None:
        """An engine has ended; is_lost: nobody has asked it to."""
        self._registry.engine_left(engine_id, why, time.monotonic(), is_lost=is_lost)

    async def accused(self, engine_id: str, replica_id: str, cause: str) -> None:
        """An engine suspects a worker; `cause` is the value of a blame.Cause."""
        self._registry.accused(engine_id, replica_id, Cause(cause), time.monotonic())
        await self._notify()

    # -- metrics --------------------------------------------------------------------------------------------------

    async def scrape(self) -> dict[str, Any]:
        """A snapshot of the whole cluster, as cluster/readings.py describes it. Waits a moment for every engine."""
        telemetry = self._telemetry
        number = telemetry.begin_scrape(time.monotonic())
        async with self._changed:
            self._changed.notify_all()
            is_complete = self._changed.wait_for(lambda: not telemetry.silent(number, self._registry.started_engines))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_complete, _SCRAPE_LIMIT_S)
        status = self._registry.status(time.monotonic())
        del status["events"]
        return {
            "version": version(),
            "model": self._model,
            "status": status,
            "events": dict(self._registry.events.counts),
            "outages": self._registry.outages.totals(time.monotonic()),
            "silent_engines": len(telemetry.silent(number, self._registry.started_engines)),
            **telemetry.to_json(),
        }

    async def wait_for_scrape(self, known: int) -> int:
        """The newest scrape's number as soon as it is not `known` (a new router begins at 0 again), or after 20 s."""
        async with self._changed:
            is_news = self._changed.wait_for(lambda: self._telemetry.number != known)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_news, _LONG_POLL_S)
        return self._telemetry.number

    async def engine_metrics(self, engine_id: str, number: int, snapshot: dict[str, Any]) -> None:
        """An engine answers that scrape: EngineMetrics.own()."""
        self._telemetry.engine_reports(engine_id, number, snapshot)
        await self._notify()

    # -- people ---------------------------------------------------------------------------------------------------

    async def report(self, source: str, stage: str) -> None:
        """`source` (a worker or an engine) says in a few words what it is doing."""
        self._progress[source] = stage

    async def scale(self, shard_id: int, replicas: int, why: str = "asked for") -> None:
        """So many replicas are wanted of a shard from now on, also by the next router. Raises ConfigError."""
        self._registry.scale(shard_id, replicas, time.monotonic(), why)
        _remember_wanted(self._deployed, dict(self._registry.wanted))

    async def begin_check(self) -> int:
        """Ask every engine for an integrity check; returns its number."""
        return self._registry.begin_check()

    async def integrity(self, number: int) -> list[dict[str, Any]] | None:
        """What check `number` has found, worker by worker and engine by engine; None while some are not done."""
        return self._registry.integrity(number)

    async def expert_load(self) -> list[list[int]]:
        """Tokens that each expert has computed since this router started: [layer][expert]."""
        tokens: list[list[int]] = self._experts.total_LE.tolist()
        return tokens

    async def note(self, kind: str, subject: str, text: str) -> None:
        """Add an event."""
        self._registry.note(kind, subject, text, time.monotonic())

    async def pulse(self, known: int, wait_s: float) -> int:
        """A number, as soon as it is not `known` because something has happened; after `wait_s` in any case."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._pulse() != known), wait_s)
        return self._pulse()

    def _pulse(self) -> int:
        happened = (*self._registry.what_happened(), dict(self._progress), self._rotation.now.stage)
        if happened != self._happened:
            self._happened, self._pulses = happened, self._pulses + 1
        return self._pulses

    async def status(self) -> dict[str, Any]:
        """Registry.status() with the names of the nodes, the model's, the layout that was asked for, what workers and
        engines report, and the table itself."""
        status = self._registry.status(time.monotonic())
        names = await self._names_of_nodes()
        for each in (*(r for shard in status["shards"] for r in shard["replicas"]), *status["engines"]):
            each["node_name"] = names.get(each["node"], "")
        return {
            "model": self._model,
            "router": {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()},
            **status,
            "layout": self._layout,
            "secret": {
                "serial": self._rotation.now.serial,
                "stage": self._rotation.now.stage,
                "everywhere": self._rotation.is_everywhere(*self._members()),
            },
            "progress": dict(self._progress),
            "table": self._registry.table.to_json(),
        }

    async def _names_of_nodes(self) -> Mapping[str, str]:
        if time.monotonic() - self._named_s > _NAMES_HOLD_S:
            self._node_names, self._named_s = await asyncio.to_thread(_node_names), time.monotonic()
        return self._node_names

    async def check_health(self) -> None:
        if self._ticking.done():
            raise RuntimeError("the expert router's clock has stopped")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._registry.tick(time.monotonic())
            replicas = {replica.replica_id for replica in self._registry.table.replicas}
            self._experts.keep(replicas)
            self._telemetry.keep(replicas, self._registry.engine_ids)
            if time.monotonic() > self._may_rotate_s and self._rotation.advance(*self._members()):
                await self._secrets_changed()
            await self._notify()

    async def _scale_by_load(self, scaler: ShardScaler) -> None:
        told: dict[int, int] = {}  # Serve may have begun anew, with the settings' numbers
        while True:
            await asyncio.sleep(_SCALE_EVERY_S)
            for shard, change in scaler.decide(self._registry.shard_loads(), time.monotonic()).items():
                await self.scale(shard, change.replicas, change.why)
            for shard, replicas in self._registry.wanted.items():
                if told.get(shard) == replicas:
                    continue
                # Ray raises many kinds while Serve's controller restarts; then it is told again.
                try:
                    await set_replicas(self._app, shard, replicas)
                    told[shard] = replicas
                except Exception as error:
                    logger.warning("Serve was not told of shard %d's %d replicas: %s", shard, replicas, error)

    def _members(self) -> tuple[list[str], tuple[str, ...]]:
        """Workers and engines that live."""
        workers = [r.replica_id for r in self._registry.table.replicas if r.state is not ReplicaState.GONE]
        return workers, self._registry.engine_ids

    async def _tell_ray(self) -> None:
        told = RayMetrics()
        while True:
            await asyncio.sleep(_TELL_RAY_EVERY_S)
            # The router's duties do not depend on Ray's metrics agent, whatever it raises.
            try:
                told.publish(readings(await self.scrape()))
            except Exception as error:
                logger.warning("metrics not handed to Ray: %r", error)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _node_names() -> dict[str, str]:
    """By Ray's node id, for the nodes that have a name."""
    return {node["NodeID"]: node["Labels"].get(NODE_LABEL, "") for node in ray.nodes()}


def _shared_secrets() -> Secrets:
    """Drawn once per Ray cluster and kept in its key-value store, so that they outlive the router."""
    internal_kv._internal_kv_put(_SECRETS_KEY, Secrets.drawn().to_json().encode(), overwrite=False)
    return Secrets.from_json(internal_kv._internal_kv_get(_SECRETS_KEY).decode())


def _wanted_before(deployed: str) -> dict[int, int]:
    """What scale() has set in the life of an earlier router of the same deployment."""
    data = internal_kv._internal_kv_get(_WANTED_KEY)
    remembered = json.loads(data) if data else {}
    return {int(shard): count for shard, count in remembered.get(deployed, {}).items()}


def _remember_wanted(deployed: str, wanted: dict[int, int]) -> None:
    internal_kv._internal_kv_put(_WANTED_KEY, json.dumps({deployed: wanted}).encode(), overwrite=True)
