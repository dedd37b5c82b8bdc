"""A worker process's time in the routing table: registered, heard of every second, drained, deregistered."""

import asyncio
import contextlib
import enum
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster.energy import EnergyMeter
from cluster.errors import SwitchyardError
from cluster.rotation import Secrets
from cluster.routing import Replica
from deployments.worker_process import WorkerProcess, in_hex

logger = logging.getLogger("ray.serve")

_HEARTBEAT_EVERY_S = 1.0
_DRAIN_LIMIT_S = 5.0
_ROUTER_LIMIT_S = 2.0
_RETRY_S = 1.0
_BUSY_OVER_S = 5.0  # requests come and go within a second; replicas do not


class End(enum.Enum):
    """How a tenure ended that nobody ended with end()."""

    DIED = "died"
    """The process ended, or hung and was killed."""
    DISMISSED = "dismissed"
    """The router told it to leave; it has."""
    CONDEMNED = "condemned"
    """So it did, because engines accuse it; a successor is wanted."""


# What the router's answers to a heartbeat (cluster/registry.py) put an end to, and how.
_ENDS = {"leave": End.DISMISSED, "restart": End.CONDEMNED}


class Tenure:
    """From begin() to end(); or until the process ends, hangs or is told to leave: then `on_end(end, why)` is called.

    With `energy`, heartbeats carry the worker's metrics, that meter's readings among them.
    """

    def __init__(
        self,
        router: DeploymentHandle,
        process: WorkerProcess,
        replica: Replica,
        ready: dict[str, Any],
        secrets: Secrets,
        hung_after_s: float,
        on_end: Callable[[End, str], None],
        energy: EnergyMeter | None,
    ) -> None:
        self._router = router
        self._process = process
        self._replica = replica
        self._ready = ready
        self._secrets = secrets
        self._hung_after_s = hung_after_s
        self._on_end = on_end
        self._energy = energy
        self._tasks: list[asyncio.Task[None]] = []
        self._last_s, self._last_tokens, self._last_compute_s = time.monotonic(), 0, 0.0
        self._busy = 0.0

    async def begin(self) -> None:
        """Enter the routing table. Raises ConfigError when the router wants another model."""
        await self._register()
        self._tasks = [asyncio.create_task(each) for each in self._duties()]

    def _duties(self) -> tuple[Coroutine[Any, Any, None], ...]:
        return self._send_heartbeats(), self._watch_process(), self._follow_secrets()

    @property
    def is_broken(self) -> bool:
        """A task has ended though nobody ended it."""
        return any(task.done() for task in self._tasks)

    async def end(self) -> None:
        """Drain, leave the table, stop the process. The other side may be gone: each step does without its blessing."""
        self._end_duties()
        has_router = await self._tell(self._router.drain.remote(self._replica.replica_id))
        with contextlib.suppress(SwitchyardError, TimeoutError):
            await asyncio.wait_for(self._process.request("drain"), _DRAIN_LIMIT_S)
        if has_router:
            await self._leave("drained")
        await self._process.stop()

    def _end_duties(self) -> None:
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _register(self) -> None:
        ready = self._ready
        await self._router.register.remote(self._replica, ready["fingerprint"], ready["memory_bytes"], ready["device"])

    async def _leave(self, why: str) -> None:
        # Without a router the table stays as it is, and the next router will not hear of this worker.
        await self._tell(self._router.leave.remote(self._replica.replica_id, why))

    @staticmethod
    async def _tell(answer: Any) -> bool:
        """Whether the router answered: it may be restarting, or end with all the rest."""
        try:
            await asyncio.wait_for(answer, _ROUTER_LIMIT_S)
        # Ray raises many kinds while the router restarts.
        except Exception:
            return False
        return True

    async def _watch_process(self) -> None:
        status = await self._process.wait()
        self._end_duties()
        await self._leave(f"its process ended with status {status}")
        await self._process.stop()
        self._on_end(End.DIED, f"the worker process {self._replica.pid} ended with status {status}")

    async def _follow_secrets(self) -> None:
        while True:
            try:
                news = await self._router.next_secrets.remote(self._replica.replica_id, self._secrets.serial)
            # Ray raises many kinds while the router restarts.
            except Exception as error:
                logger.warning("no news of the secret: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            if news is not None:
                try:
                    await self._process.request("secrets", accepted=in_hex(news))
                except SwitchyardError:
                    return  # the process has ended, and _watch_process tells
                self._secrets = news

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_EVERY_S)
            try:
                load = await asyncio.wait_for(self._load(), self._hung_after_s)
                metrics = await asyncio.wait_for(self._metrics(), self._hung_after_s)
            except SwitchyardError:
                return  # the process has ended, and _watch_process tells
            except TimeoutError:
                logger.error("worker process %d is silent for %g s: killing it", self._replica.pid, self._hung_after_s)
                self._process.kill()
                await self._process.wait()  # it may take its time, on a machine that stands still
                return
            end = _ENDS.get(await self._beat(load, metrics))
            if end is not None:
                await self.end()
                self._on_end(end, f"{end.value} by the expert router")
                return

    async def _beat(self, load: dict[str, Any], metrics: dict[str, Any] | None) -> str:
        try:
            answer: str = await self._router.heartbeat.remote(self._replica.replica_id, load, metrics)
            if answer == "register":
                await self._register()
        except SwitchyardError:
            raise
        # Ray raises many kinds while the router restarts; the next beat tries again, and Serve restarts the router.
        except Exception as error:
            logger.warning("heartbeat not delivered: %s", error)
            return "ok"
        return answer

    async def _metrics(self) -> dict[str, Any] | None:
        if self._energy is None:
            return None
        return {**(await self._process.request("metrics"))["metrics"], "energy": self._energy.read()}

    async def _load(self) -> dict[str, Any]:
        load = (await self._process.request("load"))["load"]
        now_s = time.monotonic()
        past_s, self._last_s = now_s - self._last_s, now_s
        tokens, self._last_tokens = load["tokens"] - self._last_tokens, load["tokens"]
        compute_s, self._last_compute_s = load["compute_s"] - self._last_compute_s, load["compute_s"]
        self._busy += (min(1.0, compute_s / past_s) - self._busy) * (1.0 - math.exp(-past_s / _BUSY_OVER_S))
        return {**load, "tokens_per_s": tokens / past_s, "busy": self._busy}
