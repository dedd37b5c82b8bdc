"""Expert workers: replicas of a shard, shadows in host memory, and warm spares.

The experts live in a process of their own (deployments/worker_process.py); the Serve replica starts it, registers it
with the router and watches it (deployments/tenure.py). When the replica itself ends, Serve starts another.
"""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import psutil
import ray
from ray.serve.handle import DeploymentHandle

from cluster.config import Settings, parse_settings
from cluster.energy import EnergyMeter
from cluster.layout import shards_of
from cluster.routing import Endpoint, Replica, ReplicaState, Role, Shard
from deployments.cores import allowed_cores, worker_cores
from deployments.energy import meter_of
from deployments.tenure import End, Tenure
from deployments.worker_process import WorkerProcess

logger = logging.getLogger("ray.serve")

# A ready spare that the router does not know (any more) says so again after this long.
_RETRY_S = 1.0
# A worker that served for less is succeeded after a pause, which grows each time.
_LASTING_S = 3.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
# Condemned twice within that, it may be the machine's fault: Serve looks for another place.
_SECOND_CHANCE_S = 30.0


class ExpertWorker:
    """The Serve deployment of one shard's primaries, or of its shadow.

    A worker process that dies, or is condemned, has a successor from the same replica, in about the time that its
    experts take to load.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: dict[str, Any], shard_id: int, role: Role, router: DeploymentHandle
    ) -> None:
        self._settings = _on_this_machine(parse_settings(args))
        self._shard_id = shard_id
        self._role = role
        self._router = router
        self._tenure: Tenure | None = None
        self._succession: asyncio.Task[None] | None = None
        self._pause_s = 0.0
        self._condemned_s = float("-inf")
        await self._begin()

    async def check_health(self) -> None:
        assert self._tenure is not None, "Serve asks after __init__"
        if self._tenure.is_broken and (self._succession is None or self._succession.done()):
            raise RuntimeError(f"{self._replica_id}: the worker is not watched any more")

    async def stats(self) -> dict[str, Any]:
        """The data-plane server's counters."""
        return {"replica_id": self._replica_id, **(await self._process.request("stats"))["stats"]}

    async def __del__(self) -> None:
        """Serve calls this once at the end of a graceful stop."""
        if self._succession is not None:
            self._succession.cancel()
        if self._tenure is not None:
            await self._tenure.end()
            await self._process.stop()

    async def _begin(self) -> None:
        settings, shard_id = self._settings, self._shard_id
        kind = "experts" if self._role is Role.PRIMARY else "shadow"
        self._replica_id = f"{kind}-{shard_id}-{uuid.uuid4().hex[:8]}"
        self._report("starting")
        self._process = WorkerProcess(self._report)
        try:
            await self._process.start(_device_environment())
            self._tenure = await _begin_tenure(
                self._router, self._process, settings, self._replica_id, shard_id, self._role, self._on_end
            )
        except BaseException:
            await self._process.stop()
            raise
        self._began_s = time.monotonic()
        self._report("ready")

    def _on_end(self, end: End, why: str) -> None:
        if end is End.DISMISSED or (end is End.CONDEMNED and self._had_its_second_chance()):
            _end(why)
        logger.warning("%s: %s; its successor starts", self._replica_id, why)
        self._succession = asyncio.create_task(self._succeed())

    def _had_its_second_chance(self) -> bool:
        before_s, self._condemned_s = self._condemned_s, time.monotonic()
        return self._condemned_s - before_s < _SECOND_CHANCE_S

    async def _succeed(self) -> None:
        # One that dies as soon as it serves would else be forked for ever, as fast as this machine can.
        lasted = time.monotonic() - self._began_s > _LASTING_S
        self._pause_s = 0.0 if lasted else min(max(_FIRST_PAUSE_S, 2 * self._pause_s), _LONGEST_PAUSE_S)
        await asyncio.sleep(self._pause_s)
        try:
            await self._begin()
        # Whatever it is, a new replica on perhaps another node is what is left to try.
        except Exception as error:
            _end(f"a worker's successor did not come up: {error}")

    def _report(self, stage: str) -> None:
        """Tell the router what this worker is doing, without waiting."""
        self._router.report.remote(self._replica_id, stage)


class WarmSpare:
    """The Serve deployment of the spares: processes with everything imported that adopt a shard without a worker."""

    async def __init__(self, args: dict[str, Any], router: DeploymentHandle) -> None:  # type: ignore[misc]
        self._settings = _on_this_machine(parse_settings(args))
        self._router = router
        self._replica_id = f"spare-{uuid.uuid4().hex[:8]}"
        self._tenure: Tenure | None = None
        self._adoption: asyncio.Task[None] | None = None
        self._process = WorkerProcess(self._report)
        await self._warm_up()
        self._life = asyncio.create_task(self._live())

    async def check_health(self) -> None:
        if self._life.done():
            raise RuntimeError(f"{self._replica_id}: the spare waits for orders no more")

    async def __del__(self) -> None:
        """Serve calls this once at the end of a graceful stop."""
        self._life.cancel()
        if self._tenure is not None:
            await self._tenure.end()
        await self._process.stop()
        await self._router.spare_left.remote(self._replica_id)

    async def _warm_up(self) -> None:
        self._report("importing")
        await self._process.start(_device_environment())
        await self._process.warm(self._settings, _in_host_memory())
        await self._introduce(None)
        self._report("ready")

    async def _introduce(self, shard_id: int | None) -> None:
        """Say who this is and which shard it has adopted."""
        await self._router.spare_reports.remote(self._replica_id, self._process.pid, _node(), shard_id)

    async def _live(self) -> None:
        state, shard_id = "ready", None
        while True:
            try:
                order = await self._router.spare_order.remote(self._replica_id, state)
                if order is None:  # the router is new, or has long not heard of this spare
                    await self._introduce(shard_id)
                    continue
            # Ray raises many kinds while the router restarts.
            except Exception as error:
                logger.warning("no orders from the expert router: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            state, shard_id = order
            if not self._process.is_alive or _has_failed(self._adoption):
                _end("the spare's process has ended, or could not load the shard")
            if state == "adopting" and self._adoption is None:
                self._adoption = asyncio.create_task(self._adopt(shard_id))
            elif state == "released" and self._tenure is not None:
                await self._become_spare_again(self._tenure)
                state, shard_id = "ready", None

    async def _adopt(self, shard_id: int) -> None:
        self._tenure = await _begin_tenure(
            self._router, self._process, self._settings, self._replica_id, shard_id, Role.SPARE, self._on_end
        )

    def _on_end(self, _: End, why: str) -> None:
        _end(why)

    async def _become_spare_again(self, tenure: Tenure) -> None:
        await tenure.end()
        self._tenure = self._adoption = None
        await self._router.spare_left.remote(self._replica_id)
        self._process = WorkerProcess(self._report)
        await self._warm_up()

    def _report(self, stage: str) -> None:
        self._router.report.remote(self._replica_id, stage)


async def _begin_tenure(
    router: DeploymentHandle,
    process: WorkerProcess,
    settings: Settings,
    replica_id: str,
    shard_id: int,
    role: Role,
    on_end: Callable[[End, str], None],
) -> Tenure:
    """Have the started process load the shard, and enter it in the routing table."""
    secrets = await router.secrets.remote()
    cores = worker_cores(settings, shard_id, allowed_cores())
    ready = await process.load(settings, shard_of(settings, shard_id), cores, secrets, _in_host_memory())
    replica = _replica(replica_id, shard_id, role, process.pid, ready)
    energy = _energy_meter(settings, process.pid)
    tenure = Tenure(router, process, replica, ready, secrets, settings.worker_lost_after_s, on_end, energy)
    await tenure.begin()
    return tenure


def _in_host_memory() -> bool:
    """Whether this replica has no GPU: a shadow, worker.num_gpus 0, a plan's "cpu", or a machine without any."""
    return not ray.get_gpu_ids()


def _device_environment() -> dict[str, str]:
    """No GPU is seen by what shall live in host memory."""
    return {"CUDA_VISIBLE_DEVICES": ""} if _in_host_memory() else {}


def _has_failed(task: "asyncio.Task[None] | None") -> bool:
    return task is not None and task.done() and not task.cancelled() and task.exception() is not None


def _end(why: str) -> NoReturn:
    """End this Serve replica at once: Serve notices a dead actor much sooner than three failed health checks."""
    logger.warning("the replica ends: %s", why)
    os._exit(1)


def _on_this_machine(settings: Settings) -> Settings:
    if settings.worker.host != "auto":
        return settings
    return replace(settings, worker=replace(settings.worker, host=ray.util.get_node_ip_address()))


def _node() -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node


def _energy_meter(settings: Settings, pid: int) -> EnergyMeter | None:
    """None when metrics are off."""
    return meter_of([psutil.Process(), psutil.Process(pid)], settings.worker.num_gpus) if settings.metrics else None


def _replica(replica_id: str, shard_id: int, role: Role, pid: int, ready: dict[str, Any]) -> Replica:
    endpoint = Endpoint(**ready["endpoint"])
    return Replica(replica_id, shard_id, endpoint, ReplicaState.ONLINE, pid, _node(), role)


def shard_of(settings: Settings, shard_id: int) -> Shard:
    """The shard of that number in the checkpoint of these settings."""
    from model.moe_spec import inspect_checkpoint

    spec = inspect_checkpoint(settings.model, settings.dtype)
    assert spec is not None, "build_app starts workers for checkpoints with experts only"
    return shards_of(settings, spec.num_layers, spec.num_experts)[shard_id]
