"""An expert worker: one replica of one shard.

The experts live in a child process (deployments/worker_process.py); the replica registers it with the router, sends
heartbeats, answers health checks and drains it at the end.
"""

import asyncio
import contextlib
import logging
import uuid
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from cluster.config import Settings, parse_settings
from cluster.errors import SwitchyardError
from cluster.placement import partition
from cluster.routing import Endpoint, Replica, ReplicaState, Shard
from deployments.cores import allowed_cores, worker_cores
from deployments.worker_process import WorkerProcess, kernel_environment

logger = logging.getLogger("ray.serve")

_HEARTBEAT_EVERY_S = 1.0
_DRAIN_LIMIT_S = 5.0


class ExpertWorker:
    """The Serve deployment of one shard."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: dict[str, Any], shard_id: int, router: DeploymentHandle
    ) -> None:
        settings = parse_settings(args)
        self._router = router
        self._replica_id = f"experts-{shard_id}-{uuid.uuid4().hex[:8]}"
        self._report("starting")
        cores = worker_cores(settings, shard_id, allowed_cores())
        self._process = WorkerProcess(self._report)
        secret = await router.secret.remote()
        try:
            ready = await self._process.start(
                settings, _shard_of(settings, shard_id), len(cores), secret, kernel_environment(cores)
            )
        except BaseException:
            await self._process.stop()
            raise
        self._fingerprint = ready["fingerprint"]
        self._replica = Replica(
            replica_id=self._replica_id,
            shard_id=shard_id,
            endpoint=Endpoint(**ready["endpoint"]),
            state=ReplicaState.ONLINE,
            pid=self._process.pid,
            node=ray.get_runtime_context().get_node_id(),
        )
        await self._register()
        self._heartbeats = asyncio.create_task(self._send_heartbeats())

    async def check_health(self) -> None:
        if not self._process.is_alive:
            raise RuntimeError(f"{self._replica_id}: the worker process has died")
        if self._heartbeats.done():
            raise RuntimeError(f"{self._replica_id}: the heartbeats have stopped")

    async def stats(self) -> dict[str, Any]:
        """The data-plane server's counters."""
        return {"replica_id": self._replica_id, **(await self._process.request("stats"))["stats"]}

    async def __del__(self) -> None:
        """Serve calls this once at the end of a graceful stop: drain, deregister, stop."""
        if not hasattr(self, "_heartbeats"):
            return
        self._heartbeats.cancel()
        # At shutdown the router or the process may be gone first; leaving without their blessing is fine.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._router.drain.remote(self._replica_id), _DRAIN_LIMIT_S)
        with contextlib.suppress(SwitchyardError, TimeoutError):
            await asyncio.wait_for(self._process.request("drain"), _DRAIN_LIMIT_S)
        await self._process.stop()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._router.leave.remote(self._replica_id), _DRAIN_LIMIT_S)

    async def _register(self) -> None:
        await self._router.register.remote(self._replica, self._fingerprint)
        self._report("ready")

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_EVERY_S)
            if not self._process.is_alive:
                await self._router.leave.remote(self._replica_id)
                return
            try:
                if not await self._router.heartbeat.remote(self._replica_id):
                    await self._register()
            except SwitchyardError:
                raise
            # Ray raises many kinds while the router restarts; the next beat tries again, and Serve restarts the router.
            except Exception as error:
                logger.warning("heartbeat not delivered: %s", error)

    def _report(self, stage: str) -> None:
        """Tell the router what this worker is doing, without waiting."""
        self._router.report.remote(self._replica_id, stage)


def _shard_of(settings: Settings, shard_id: int) -> Shard:
    from model.moe_spec import inspect_checkpoint

    spec = inspect_checkpoint(settings.model, settings.dtype)
    assert spec is not None, "build_app starts workers for checkpoints with experts only"
    return partition(spec.num_layers, spec.num_experts, settings.workers)[shard_id]
