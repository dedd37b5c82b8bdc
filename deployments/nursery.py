"""A node's nursery of worker processes (model/nursery.py), as its Serve replicas use it."""

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import SwitchyardError
from model.nursery import peer_user

_START_LIMIT_S = 180.0
_LAST_WORDS_S = 1.0


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
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def _await_end(self) -> int:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            await ended.wait()
            words = b""
            try:
                async with asyncio.timeout(_LAST_WORDS_S):
                    words = await loop.sock_recv(self._connection, 4096)
            except (TimeoutError, OSError):
                pass
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


def _ask(environment: Mapping[str, str], stdin: int, stdout: int) -> tuple[socket.socket, int, int]:
    raylet = os.getppid()
    connection = _connect(_name(raylet), raylet)
    try:
        request = json.dumps({"environment": dict(environment)}).encode() + b"\n"
        sent = socket.send_fds(connection, [request], [stdin, stdout, 2])
        connection.sendall(request[sent:])
        answer, descriptors, _, _ = socket.recv_fds(connection, 4096, 1)
        if not answer:
            raise NurseryFailed("the nursery refused to start a worker process; its log is this replica's stderr")
        return connection, int(json.loads(answer)["pid"]), descriptors[0]
    except (OSError, ValueError) as error:
        connection.close()
        raise NurseryFailed(f"the nursery of worker processes did not answer: {error}") from error
    except BaseException:
        connection.close()
        raise


def _connect(name: str, raylet: int) -> socket.socket:
    """Connected to the nursery of that name, which is started if there is none."""
    end_s = time.monotonic() + _START_LIMIT_S
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_START_LIMIT_S)  # one that is importing answers when it has
        try:
            connection.connect("\0" + name)
            if peer_user(connection) == os.getuid():
                return connection
            raise NurseryFailed(f"the socket @{name} belongs to another user")
        except ConnectionRefusedError:  # there is none, or it ended just now
            connection.close()
        except BaseException:
            connection.close()
            raise
        if time.monotonic() > end_s:
            raise NurseryFailed(f"no nursery of worker processes came up within {_START_LIMIT_S:g} s")
        _start(name, raylet)


def _start(name: str, raylet: int) -> None:
    """Returns when there is one to connect to, which may be another that came first."""
    command = [sys.executable, "-m", "model.nursery", name, str(raylet)]
    run = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=2, env=_environment(), start_new_session=True, check=False
    )
    if run.returncode:
        raise NurseryFailed(f"the nursery of worker processes did not start: its status is {run.returncode}")


def _name(raylet: int) -> str:
    """One per node, user and installation."""
    installation = hashlib.sha256(f"{sys.prefix}:{Path(__file__).parents[1]}".encode()).hexdigest()[:12]
    return f"switchyard-nursery-{os.getuid()}-{raylet}-{installation}"


def _environment() -> dict[str, str]:
    """What libraries read when they are loaded; the rest each worker gets with its fork.

    One thread, so that none exists when it forks. vLLM's CPU kernels want PyTorch's libgomp loaded first, else two
    runtimes share the cores (vllm/platforms/cpu.py).
    """
    import torch

    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    preload = [os.environ.get("LD_PRELOAD", ""), str(library) if library.exists() else ""]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(path for path in preload if path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
