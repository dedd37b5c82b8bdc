"""The process that holds a shard's experts (model/worker_main.py), started and asked from its Serve replica."""

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cluster.config import Settings
from cluster.errors import ConnectionLost, SwitchyardError
from cluster.rotation import Secrets
from cluster.routing import Shard
from deployments.nursery import Child, fork_worker

_STOP_LIMIT_S = 5.0
_LONGEST_REPORT_BYTES = 16 << 20  # expert loads of a model with many layers and experts
_ANSWERS = {"stats": "stats", "load": "load", "metrics": "metrics", "drain": "drained", "secrets": "secrets"}


class WorkerFailed(SwitchyardError):
    """The worker process could not load its experts; the message carries its own words."""


class WorkerProcess:
    """One worker process. start(), warm() for a spare, load() once, then request(); stop() always."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        self._on_stage = on_stage
        self._child: Child | None = None
        self._reports: asyncio.StreamReader | None = None
        self._orders: asyncio.WriteTransport | None = None
        self._asking = asyncio.Lock()

    async def start(self, environment: Mapping[str, str]) -> None:
        """Start the process; it waits for what to do. Raises NurseryFailed."""
        loop = asyncio.get_running_loop()
        their_stdin, ours = os.pipe()
        theirs, their_stdout = os.pipe()
        orders, reports = os.fdopen(ours, "wb", buffering=0), os.fdopen(theirs, "rb", buffering=0)
        reader = self._reports = asyncio.StreamReader(limit=_LONGEST_REPORT_BYTES)
        try:
            self._orders, _ = await loop.connect_write_pipe(asyncio.Protocol, orders)
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), reports)
            self._child = await fork_worker(
                {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **environment}, their_stdin, their_stdout
            )
        except BaseException:
            orders.close()
            reports.close()
            raise
        finally:
            os.close(their_stdin)
            os.close(their_stdout)

    async def warm(self, settings: Settings, in_host_memory: bool) -> None:
        """Have everything imported that loading will need. Raises WorkerFailed."""
        model = {"model": settings.model, "dtype": settings.dtype, "in_host_memory": in_host_memory}
        await self._send({"warm": model})
        await self._receive_until("warm")

    async def load(
        self, settings: Settings, shard: Shard, cores: Sequence[int], secrets: Secrets, in_host_memory: bool
    ) -> dict[str, Any]:
        """Load a shard and serve it on these cores: {"endpoint", "fingerprint", "memory_bytes", "device"}.

        in_host_memory: not on a GPU, even if the process could see one. Raises WorkerFailed.
        """
        await self._send(
            {
                "model": settings.model,
                "dtype": settings.dtype,
                "shard": asdict(shard),
                "secrets": in_hex(secrets),
                "cores": list(cores),
                "max_tokens": settings.engine.max_num_batched_tokens,
                "tcp_host": settings.worker.host,
                "tls": settings.worker.tls,
                "fault_injection": settings.worker.fault_injection,
                "in_host_memory": in_host_memory,
            }
        )
        return await self._receive_until("ready")

    async def _receive_until(self, wanted: str) -> dict[str, Any]:
        while True:
            message = await self._receive()
            if wanted in message:
                found: dict[str, Any] = message[wanted]
                return found
            if "failed" in message:
                raise WorkerFailed(message["failed"])
            self._on_stage(message["stage"])

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    @property
    def is_alive(self) -> bool:
        return self._child is not None and self._child.status is None

    async def wait(self) -> int:
        """Until it has ended, however that happens; returns its status, negative for a signal."""
        assert self._child is not None
        return await self._child.wait()

    def kill(self) -> None:
        """SIGKILL; wait() returns then."""
        if self._child is not None:
            self._child.kill()

    async def request(self, command: str, **details: Any) -> dict[str, Any]:
        """Send a command of model/worker_main.py and return its answer. Raises ConnectionLost if it is gone."""
        async with self._asking:
            await self._send({"command": command, **details})
            while True:
                answer = await self._receive()
                if _ANSWERS[command] in answer:  # else the answer to a request that was cancelled
                    return answer

    async def stop(self) -> None:
        """Let it finish what it has taken; kill it if that takes too long."""
        if self._child is None:
            return
        assert self._orders is not None
        self._orders.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._child.wait(), _STOP_LIMIT_S)
        self._child.kill()
        await self._child.wait()

    async def _send(self, message: Mapping[str, Any]) -> None:
        assert self._child is not None and self._orders is not None
        if self._orders.is_closing() or not self.is_alive:
            raise ConnectionLost(f"worker process {self._child.pid} has ended")
        self._orders.write(json.dumps(message).encode() + b"\n")

    async def _receive(self) -> dict[str, Any]:
        assert self._child is not None and self._reports is not None
        line = await self._reports.readline()
        if not line:
            status = await self._child.wait()
            raise ConnectionLost(f"worker process {self._child.pid} has ended with status {status}")
        message: dict[str, Any] = json.loads(line)
        return message


def in_hex(secrets: Secrets) -> list[str]:
    """What a worker process is told of them."""
    return [secret.hex() for secret in secrets.accepted]
