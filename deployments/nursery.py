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
import time
from collections.abc import Mapping
from pathlib import Path

from cluster.auth import peer_user
from cluster.errors import SwitchyardError
from deployments.environment import quiet_environment

NURSERY = "SWITCHYARD_NURSERY"
"""The variable with the name of the node's nursery."""
_START_LIMIT_S = 180.0
_TRY_EVERY_S = 0.05
_LAST_WORDS_S = 1.0

_own: tuple[str, subprocess.Popen[bytes]] | None = None


class NurseryFailed(SwitchyardError):
    """No worker process could be had on this node."""


class Child:
    """A worker process. Its status is None while it runs, and -SIGKILL too when the nursery did not live to tell."""

    def __init__(self, connection: socket.socket, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._connection = connection
        self._pidfd = pidfd
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
    connection, pid, pidfd = await asyncio.to_thread(_ask, environment, stdin, stdout)
    connection.setblocking(False)
    return Child(connection, pid, pidfd)


def start_nursery(name: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    """A nursery that listens on `name` for as long as this process lives. It speaks to `log`, else to our stderr."""
    with contextlib.nullcontext(2) if log is None else log.open("ab") as output:
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


def _ask(environment: Mapping[str, str], stdin: int, stdout: int) -> tuple[socket.socket, int, int]:
    connection = _connect()
    try:
        request = json.dumps({"environment": dict(environment)}).encode() + b"\n"
        sent = socket.send_fds(connection, [request], [stdin, stdout, 2])
        connection.sendall(request[sent:])
        answer, descriptors, _, _ = socket.recv_fds(connection, 4096, 1)
        if not answer:
            raise NurseryFailed("the nursery refused to start a worker process; its own words are in its log")
        return connection, int(json.loads(answer)["pid"]), descriptors[0]
    except (OSError, ValueError) as error:
        connection.close()
        raise NurseryFailed(f"the nursery of worker processes did not answer: {error}") from error
    except BaseException:
        connection.close()
        raise


def _connect() -> socket.socket:
    """Connected to the node's nursery; to one of this process's own where the node has none, or has lost it."""
    global _own
    for name in filter(None, (os.environ.get(NURSERY), _own[0] if _own else None)):
        connection = _try(name)
        if connection is not None:
            return connection
    name = nursery_name()
    _own = (name, start_nursery(name))
    end_s = time.monotonic() + _START_LIMIT_S
    while (connection := _try(name)) is None:
        if _own[1].poll() is not None or time.monotonic() > end_s:
            raise NurseryFailed("the nursery of worker processes did not start; its own words are in this log")
        time.sleep(_TRY_EVERY_S)
    return connection


def _try(name: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_START_LIMIT_S)  # one that is importing answers when it has
    try:
        connection.connect("\0" + name)
    except OSError:
        connection.close()
        return None
    if peer_user(connection) != os.getuid():
        connection.close()
        return None
    return connection


def _environment() -> dict[str, str]:
    """What libraries read when they are loaded; the rest each worker gets with its fork.

    One thread, so that none exists when it forks. vLLM's CPU kernels want PyTorch's libgomp loaded first, else two
    runtimes share the cores (vllm/platforms/cpu.py).
    """
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    library = Path(torch.origin).parent / "lib" / "libgomp.so.1"
    preload = [os.environ.get("LD_PRELOAD", ""), str(library) if library.exists() else ""]
    return {
        **os.environ,
        **quiet_environment(),
        "LD_PRELOAD": ":".join(path for path in preload if path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
