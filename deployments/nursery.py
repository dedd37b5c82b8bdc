"""A node's nursery of worker processes (model/nursery.py), as the node starts it and its Serve replicas use it.

Whoever starts Ray on a node starts the nursery beside it and names it to Ray's processes in the environment. Elsewhere
(a Ray that somebody else has started) each replica has one of its own: slower to come up, as quick to replace a worker.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from deployments.environment import quiet_environment
from model.nursery_client import NURSERY as NURSERY  # also for who starts a node
from model.nursery_client import WORKER, Fork, NurseryFailed, ask, connect

PYTHON = "SWITCHYARD_PYTHON"
"""The variable with the Python of the node."""
# What replicas are started with in Python's place, by their runtime environment; a shell of the node reads it.
REPLICA_PYTHON = f'"${PYTHON}" -m model.forked_python deployments.ray_worker'
_START_LIMIT_S = 180.0
_TRY_EVERY_S = 0.05
_SUCCESSOR_LIMIT_S = 3.0  # in which a node's nursery that has ended has another in its place
_SHORTEST_LIFE_S = 2.0  # of one after which there is another at once
_LAST_WORDS_S = 1.0

_own: tuple[str, subprocess.Popen[bytes]] | None = None


class Child:
    """A worker process. Its status is None while it runs, and -SIGKILL too when the nursery did not live to tell."""

    def __init__(self, fork: Fork) -> None:
        self.pid, self._pidfd, self._connection = fork
        self._connection.setblocking(False)
        self.status: int | None = None
        self._end = asyncio.ensure_future(self._await_end())

    async def wait(self) -> int:
        """Until it has ended; returns its status, negative for a signal."""
        return await asyncio.shield(self._end)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and nobody has told yet
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def _await_end(self) -> int:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            await ended.wait()
            loop.remove_reader(self._pidfd)
            words = b""
            with contextlib.suppress(TimeoutError, OSError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    words = await loop.sock_recv(self._connection, 4096)
            self.status = json.loads(words)["status"] if words else -signal.SIGKILL
        finally:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._connection.close()
        return self.status


async def fork_worker(environment: Mapping[str, str], stdin: int, stdout: int) -> Child:
    """A worker process of this node with those descriptors; its stderr is ours. Raises NurseryFailed."""

    def fork() -> Fork:
        return ask(_connect(), WORKER, environment, (stdin, stdout, 2))

    return Child(await asyncio.to_thread(fork))


def keep_nursery(name: str, log: Path, is_stopping: threading.Event) -> None:
    """A nursery that listens on `name` until `is_stopping`; when one ends (the memory was short), another comes."""
    output = log.open("ab")

    def keep() -> None:
        with output:
            while not is_stopping.is_set():
                began_s = time.monotonic()
                start_nursery(name, output.fileno()).wait()
                is_stopping.wait(_SHORTEST_LIFE_S - (time.monotonic() - began_s))

    threading.Thread(target=keep, name="nursery", daemon=True).start()


def start_nursery(name: str, output: int = 2) -> subprocess.Popen[bytes]:
    """A nursery that listens on `name` for as long as this process lives, and speaks to that descriptor."""
    return subprocess.Popen(
        [sys.executable, "-m", "model.nursery", name, str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=_environment(),
        start_new_session=True,  # the starter's signals are not for the workers
    )


def nursery_name() -> str:
    """A new one, which nobody can guess and so take before."""
    return f"switchyard-nursery-{os.getpid()}-{secrets.token_hex(8)}"


def _connect() -> socket.socket:
    """Connected to the node's nursery; to one of this process's own where the node has none, or has lost it."""
    global _own
    for name, limit_s in ((os.environ.get(NURSERY), _SUCCESSOR_LIMIT_S), (_own and _own[0], 0.0)):
        if name and (connection := _connect_within(limit_s, name)) is not None:
            return connection
    name = nursery_name()
    _own = (name, start_nursery(name))
    connection = _connect_within(_START_LIMIT_S, name, _own[1])
    if connection is None:
        raise NurseryFailed("the nursery of worker processes did not start; its own words are in this log")
    return connection


def _connect_within(limit_s: float, name: str, starting: subprocess.Popen[bytes] | None = None) -> socket.socket | None:
    """Connected to that nursery; None when time is up, or the one that is starting has ended."""
    end_s = time.monotonic() + limit_s
    while (connection := connect(name)) is None:
        if time.monotonic() >= end_s or (starting is not None and starting.poll() is not None):
            return None
        time.sleep(_TRY_EVERY_S)
    return connection


def _environment() -> dict[str, str]:
    """What libraries read when they are loaded; the rest each worker gets with its fork.

    One thread, so that none exists when it forks. vLLM's CPU kernels want PyTorch's libgomp loaded first, else two
    runtimes share the cores, and its allocator where it brings one; Inductor is told what vLLM tells it before it
    starts a process (vllm/platforms/cpu.py).

    Tensors lie in huge pages: a kernel that comes after another process's finds the page tables in no cache, and
    reading them costs as much as reading the weights (ops/bench/README.md).
    """
    libraries = [*_found("vllm", "libs/libtcmalloc*.so*"), *_found("torch", "lib/libgomp.so.1")]
    preload = [os.environ.get("LD_PRELOAD", ""), *libraries]
    return {
        "THP_MEM_ALLOC_ENABLE": "1",  # c10/core/impl/alloc_cpu.cpp
        **os.environ,
        **quiet_environment(),
        "LD_PRELOAD": ":".join(path for path in preload if path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
    }


def _found(package: str, pattern: str) -> list[str]:
    """The first file of an installed package that matches, if there is one."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return [str(path) for path in sorted(Path(spec.origin).parent.glob(pattern))[:1]]
