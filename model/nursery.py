"""Processes in a moment: `python -m model.nursery NAME PID` imports vLLM once and forks them from then on.

Importing vLLM takes ten seconds of a core, for every process that does it. One such process per node pays them. An
expert worker is a fork of it, so a worker that was killed has a successor as soon as its experts are loaded; so are
the processes that an engine starts, and Ray's workers, which are modules that import the same.

It listens on the abstract Unix socket NAME for processes of the same user, for as long as process PID lives. A
connection is one fork's life:
    client    {"work": "worker", "process" or "module", "arguments": [..], "environment": {..}} with the fork's
              descriptors: stdin, stdout, stderr, and for a process of multiprocessing those that it inherits
              (model/forked_process.py); the arguments are a module's, its name first (model/forked_python.py)
    fork      {"pid": n} with one descriptor, its pidfd (pidfd_open(2)); so a client without an answer has no fork
    nursery   when it has ended {"status": n}, as subprocess.Popen.returncode has it
A client that closes the connection, or dies, has no fork: what is left of it after some seconds is killed. Only a
module is nobody's, and lives as long as it likes. Or the connection is one question: {"forks_of": pid} is answered
{"forks": [pid, ..]}, the forks that live and that this process has asked for.

Forking is safe while this process has one thread: it computes nothing, and what its libraries start is counted.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setproctitle import setproctitle

from cluster.auth import peer
from model.nursery_client import MODULE, PROCESS, TITLE, WORKER

_ORPHAN_LIMIT_S = 6.0  # longer than a client waits for its worker to end in peace
_REQUEST_LIMIT_BYTES = 1 << 20
_REQUEST_LIMIT_S = 5.0
_MOST_DESCRIPTORS = 64
_STANDARD = 3  # stdin, stdout and stderr

_OF_ENGINES = (
    "model.forked_process",
    "model.remote_experts",
    "model.grok",
    "model.partial_loading",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "torch._inductor.compile_fx",
    "vllm.v1.engine.async_llm",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.app",
)

Work = Callable[[Sequence[str], Sequence[int]], int]
"""What a fork does, from its arguments and the descriptors beside the three standard ones; returns its exit status."""


@dataclass
class _Fork:
    connection: socket.socket | None
    """None of a module, which is nobody's."""
    client: int | None
    orphaned_at_s: float | None = None


def main() -> int:
    """Exit status 0 when the watched process has ended, or as a fork."""
    name, watched = sys.argv[1], int(sys.argv[2])
    try:
        watched_fd = os.pidfd_open(watched)
    except ProcessLookupError:
        return 0
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + name)
    listener.listen(64)  # whoever asks meanwhile waits here
    # By it the nursery is found; and it has to know where titles go before a fork's environment changes.
    setproctitle(f"{TITLE}{name}")
    works: dict[str, Work] = {WORKER: _be_a_worker, PROCESS: _be_a_process}
    if _import_everything():
        works[MODULE] = _be_a_module
    return Nursery(listener, watched_fd, works).run()


class Nursery:
    """The loop of the process. run() returns the exit status, in forks too, which is what their work returns."""

    def __init__(self, listener: socket.socket, watched_fd: int, works: Mapping[str, Work]) -> None:
        self._works = works
        self._listener = listener
        self._watched_fd = watched_fd
        self._forks: dict[int, _Fork] = {}
        self._deaths, self._death_bell = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._is_ending = False

    def run(self) -> int:
        """Until the watched process has ended and no fork is left."""
        for end in (self._deaths, self._death_bell):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._death_bell.fileno(), warn_on_full_buffer=False)
        for each in (self._listener, self._deaths, self._watched_fd):
            self._selector.register(each, selectors.EVENT_READ)
        while self._forks or not self._is_ending:
            for key, _ in self._selector.select(timeout=1.0):
                if key.fileobj is self._listener:
                    work = self._accept()
                    if work is not None:
                        return work()
                elif key.fileobj is self._deaths:
                    with contextlib.suppress(BlockingIOError):
                        self._deaths.recv(4096)
                elif key.fileobj == self._watched_fd:
                    self._selector.unregister(self._watched_fd)
                    self._is_ending = True  # clients that outlive it have their forks until they end
                else:
                    assert isinstance(key.fileobj, socket.socket), "a client's"
                    self._orphan(key.fileobj)
            self._bury()
            self._kill_orphans()
        return 0

    def _accept(self) -> Callable[[], int] | None:
        """Answer a client. In the fork that it has asked for: what that has to do."""
        connection, _ = self._listener.accept()
        descriptors: list[int] = []
        is_fork = False
        try:
            if peer(connection).user != os.getuid():
                raise PermissionError("a process of another user")
            request = _receive(connection, descriptors)
            if "forks_of" in request:
                self._tell_forks_of(request["forks_of"], connection)
                return None
            work, arguments = self._works[request["work"]], request["arguments"]
            if len(descriptors) < _STANDARD:
                raise ValueError("three descriptors are wanted")
            is_free = request["work"] == MODULE
            is_fork = self._fork(connection, request["environment"], descriptors[:_STANDARD], is_free)
        except (OSError, ValueError, KeyError) as error:
            print(f"nursery: a request was refused: {error}", file=sys.stderr, flush=True)
            connection.close()
            return None
        finally:
            for each in descriptors[:_STANDARD] if is_fork else descriptors:
                os.close(each)
        return functools.partial(work, arguments, descriptors[_STANDARD:]) if is_fork else None

    def _tell_forks_of(self, client: int, connection: socket.socket) -> None:
        forks = [pid for pid, fork in self._forks.items() if fork.client == client]
        connection.sendall(json.dumps({"forks": forks}).encode() + b"\n")
        connection.close()

    def _fork(
        self, connection: socket.socket, environment: dict[str, str], standard: Sequence[int], is_free: bool
    ) -> bool:
        """Whether this is the fork."""
        if (threads := len(list(Path("/proc/self/task").iterdir()))) != 1:
            print(f"nursery: forking with {threads} threads is not safe", file=sys.stderr, flush=True)
        client = peer(connection).pid
        pid = os.fork()
        if pid == 0:
            _answer(connection)
            self._forget(connection)
            for number, descriptor in enumerate(standard):
                os.dup2(descriptor, number)
            os.environ.clear()
            os.environ.update(environment)
            return True
        if is_free:
            self._forks[pid] = _Fork(None, None)
            connection.close()
        else:
            self._forks[pid] = _Fork(connection, client)
            self._selector.register(connection, selectors.EVENT_READ)
        return False

    def _forget(self, connection: socket.socket) -> None:
        """In the fork: close all that is the nursery's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        os.close(self._watched_fd)
        others = (fork.connection for fork in self._forks.values() if fork.connection is not None)
        for each in (self._listener, self._deaths, self._death_bell, connection, *others):
            each.close()

    def _orphan(self, connection: socket.socket) -> None:
        for fork in self._forks.values():
            if fork.connection is connection:
                fork.orphaned_at_s = time.monotonic()
                self._selector.unregister(connection)

    def _bury(self) -> None:
        while self._forks:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            fork = self._forks.pop(pid)
            if fork.connection is None:
                continue
            if fork.orphaned_at_s is None:
                self._selector.unregister(fork.connection)
            with contextlib.suppress(OSError):
                fork.connection.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
            fork.connection.close()

    def _kill_orphans(self) -> None:
        now_s = time.monotonic()
        for pid, fork in self._forks.items():
            if fork.orphaned_at_s is not None and now_s - fork.orphaned_at_s > _ORPHAN_LIMIT_S:
                os.kill(pid, signal.SIGKILL)


def _be_a_worker(_arguments: Sequence[str], _descriptors: Sequence[int]) -> int:
    from model import worker_main

    setproctitle("switchyard: expert worker")
    return worker_main.main()


def _be_a_process(_arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    from model import forked_process

    setproctitle("switchyard: engine process")
    return _ended(forked_process.run(descriptors))


def _be_a_module(arguments: Sequence[str], _descriptors: Sequence[int]) -> int:
    from model import forked_python

    setproctitle(" ".join(["python", "-m", *arguments]))
    return _ended(forked_python.run(arguments))


def _ended(status: int) -> int:
    """What a Python does at its end, for those that leave by os._exit()."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status


def _answer(connection: socket.socket) -> None:
    """In the fork: tell the client of it. Where nobody asks any more, it ends."""
    pid = os.getpid()
    pidfd = os.pidfd_open(pid)
    try:
        socket.send_fds(connection, [json.dumps({"pid": pid}).encode() + b"\n"], [pidfd])
    except OSError:
        os._exit(1)
    os.close(pidfd)


def _receive(connection: socket.socket, descriptors: list[int]) -> dict[str, Any]:
    """A client's request; the descriptors that come with it are added to the list."""
    connection.settimeout(_REQUEST_LIMIT_S)
    words, received, _, _ = socket.recv_fds(connection, _REQUEST_LIMIT_BYTES, _MOST_DESCRIPTORS)
    descriptors += received
    while not words.endswith(b"\n"):
        more = connection.recv(_REQUEST_LIMIT_BYTES)
        if not more:
            raise ConnectionError("the client left")
        words += more
    request: dict[str, Any] = json.loads(words)
    return request


def _import_everything() -> bool:
    """What loading experts and serving them will import, but nothing that starts a thread or asks for a device.

    Nor Ray, which reads what sets one of its workers apart from the environment when it is imported; vLLM would.
    Returns whether engines compute on CPUs here: on GPUs their processes are not forked (model/forked_process.py).
    """
    sys.modules["ray"] = None  # type: ignore[assignment]  # so vLLM finds none
    importlib.import_module("cluster.sabotage")
    importlib.import_module("cluster.tls")
    importlib.import_module("model.hosted_experts").import_kernels()
    is_cpu = bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())
    if is_cpu:
        for name in _OF_ENGINES:
            importlib.import_module(name)
    del sys.modules["ray"]
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, pages that forks share
    return is_cpu


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # vLLM's end of the interpreter takes two seconds, in which a drained worker keeps its memory
