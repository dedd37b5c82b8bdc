"""A worker process's time in the routing table: registered, heard of every second, drained, deregistered."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster.errors import SwitchyardError
from cluster.routing import Replica
from deployments.worker_process import WorkerProcess

logger = logging.getLogger("ray.serve")

_HEARTBEAT_EVERY_S = 1.0
_DRAIN_LIMIT_S = 5.0


class Tenure:
    """From begin() to end(); or until the process ends, hangs or is told to leave: then `on_end(why)` is called."""

    def __init__(
        self,
        router: DeploymentHandle,
        process: WorkerProcess,
        replica: Replica,
        ready: dict[str, Any],
        hung_after_s: float,
        on_end: Callable[[str], None],
    ) -> None:
        self._router = router
        self._process = process
        self._replica = replica
        self._ready = ready
        self._hung_after_s = hung_after_s
        self._on_end = on_end
        self._tasks: list[asyncio.Task[None]] = []
        self._last = (time.monotonic(), 0)

    async def begin(self) -> None:
        """Enter the routing table. Raises ConfigError when the router wants another model."""
        await self._register()
        self._tasks = [asyncio.create_task(each) for each in (self._send_heartbeats(), self._watch_process())]

    @property
    def is_broken(self) -> bool:
        """A task has ended though nobody ended it."""
        return any(task.done() for task in self._tasks)

    async def end(self) -> None:
        """Drain, leave the table, stop the process. The other side may be gone: each step does without its blessing."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._router.drain.remote(self._replica.replica_id), _DRAIN_LIMIT_S)
        with contextlib.suppress(SwitchyardError, TimeoutError):
            await asyncio.wait_for(self._process.request("drain"), _DRAIN_LIMIT_S)
        await self._leave("drained")
        await self._process.stop()

    async def _register(self) -> None:
        ready = self._ready
        await self._router.register.remote(self._replica, ready["fingerprint"], ready["memory_bytes"], ready["device"])

    async def _leave(self, why: str) -> None:
        # Without a router the table stays as it is, and the next router will not hear of this worker.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._router.leave.remote(self._replica.replica_id, why), _DRAIN_LIMIT_S)

    async def _watch_process(self) -> None:
        status = await self._process.wait()
        await self._leave(f"its process ended with status {status}")
        self._on_end(f"the worker process {self._replica.pid} ended with status {status}")

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_EVERY_S)
            try:
                load = await asyncio.wait_for(self._load(), self._hung_after_s)
            except SwitchyardError:
                return  # the process has ended, and _watch_process tells
            except TimeoutError:
                logger.error("worker process %d is silent for %g s: killing it", self._replica.pid, self._hung_after_s)
                self._process.kill()
                return
            if await self._beat(load) == "leave":
                await self.end()
                self._on_end("told to leave")
                return

    async def _beat(self, load: dict[str, Any]) -> str:
        try:
            answer: str = await self._router.heartbeat.remote(self._replica.replica_id, load)
            if answer == "register":
                await self._register()
        except SwitchyardError:
            raise
        # Ray raises many kinds while the router restarts; the next beat tries again, and Serve restarts the router.
        except Exception as error:
            logger.warning("heartbeat not delivered: %s", error)
            return "ok"
        return answer

    async def _load(self) -> dict[str, Any]:
        load = (await self._process.request("load"))["load"]
        now_s = time.monotonic()
        (last_s, last_tokens), self._last = self._last, (now_s, load["tokens"])
        return {**load, "tokens_per_s": (load["tokens"] - last_tokens) / (now_s - last_s)}
