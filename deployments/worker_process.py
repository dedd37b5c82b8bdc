"""The child process that holds a shard's experts (model/worker_main.py), started and asked from its Serve replica."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.config import Settings
from cluster.errors import ConnectionLost, SwitchyardError
from cluster.rotation import Secrets
from cluster.routing import Shard

_STOP_LIMIT_S = 5.0
_ANSWERS = {"stats": "stats", "load": "load", "metrics": "metrics", "drain": "drained", "secrets": "secrets"}


class WorkerFailed(SwitchyardError):
    """The worker process could not load its experts; the message carries its own words."""


class WorkerProcess:
    """One worker process. start(), warm() for a spare, load() once, then request(); stop() always."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        self._on_stage = on_stage
        self._process: asyncio.subprocess.Process | None = None
        self._asking = asyncio.Lock()

    async def start(self, environment: Mapping[str, str]) -> None:
        """Start the process; it waits for what to do."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "model.worker_main",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **environment},
        )

    async def warm(self, settings: Settings) -> None:
        """Have everything imported that loading will need. Raises WorkerFailed."""
        await self._send({"warm": {"model": settings.model, "dtype": settings.dtype}})
        await self._receive_until("warm")

    async def load(self, settings: Settings, shard: Shard, num_threads: int, secrets: Secrets) -> dict[str, Any]:
        """Load a shard and serve it: {"endpoint", "fingerprint", "memory_bytes", "device"}. Raises WorkerFailed."""
        await self._send(
            {
                "model": settings.model,
                "dtype": settings.dtype,
                "shard": asdict(shard),
                "secrets": in_hex(secrets),
                "num_threads": num_threads,
                "max_tokens": settings.engine.max_num_batched_tokens,
                "tcp_host": settings.worker.host,
                "tls": settings.worker.tls,
                "fault_injection": settings.worker.fault_injection,
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
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def wait(self) -> int:
        """Until it has ended, however that happens; returns its status, negative for a signal."""
        assert self._process is not None
        return await self._process.wait()

    def kill(self) -> None:
        """SIGKILL; wait() returns then."""
        if self.is_alive:
            assert self._process is not None
            self._process.kill()

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
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _STOP_LIMIT_S)
        if process.returncode is None:
            process.kill()
            await process.wait()

    async def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise ConnectionLost(f"worker process {self._process.pid} has ended") from None

    async def _receive(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            status = await self._process.wait()
            raise ConnectionLost(f"worker process {self._process.pid} has ended with status {status}")
        message: dict[str, Any] = json.loads(line)
        return message


def in_hex(secrets: Secrets) -> list[str]:
    """What a worker process is told of them."""
    return [secret.hex() for secret in secrets.accepted]


def kernel_environment(cores: Sequence[int], bind: bool = True) -> dict[str, str]:
    """What OpenMP reads when a worker process starts: as many threads as cores, each bound to its own (unless not).

    vLLM's CPU kernels want PyTorch's libgomp loaded first, else two runtimes share the cores (vllm/platforms/cpu.py).
    """
    import torch

    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    preload = [os.environ.get("LD_PRELOAD", ""), str(library) if library.exists() else ""]
    return {
        "LD_PRELOAD": ":".join(path for path in preload if path),
        "OMP_NUM_THREADS": str(len(cores)),
        "GLOO_SOCKET_IFNAME": "lo",
        **({"GOMP_CPU_AFFINITY": " ".join(map(str, cores))} if bind else {}),
    }
