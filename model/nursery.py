"""Worker processes in a moment: `python -m model.nursery NAME PID` imports vLLM once and forks them from then on.

Importing vLLM takes ten seconds of a core, for every process that does it. One such process per node pays them; an
expert worker is a fork of it, so a worker that was killed has a successor as soon as its experts are loaded.

It listens on the abstract Unix socket NAME for processes of the same user, for as long as process PID lives. A
connection is one worker's life:
    client    {"environment": {..}} with three descriptors: the worker's stdin, stdout and stderr
    nursery   {"pid": n} with one descriptor, a pidfd of the worker (pidfd_open(2)); then, when it has ended,
              {"status": n}, as subprocess.Popen.returncode has it
A client that closes the connection, or dies, has no worker: what is left of it after some seconds is killed.

Forking is safe while this process has one thread: it computes nothing, and what its libraries start is counted.
"""

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setproctitle import setproctitle

from cluster.auth import peer_user

_ORPHAN_LIMIT_S = 6.0  # longer than a client waits for its worker to end in peace
_REQUEST_LIMIT_BYTES = 1 << 20
_REQUEST_LIMIT_S = 5.0


@dataclass
class _Worker:
    connection: socket.socket
    orphaned_at_s: float | None = None


def main() -> int:
    """Exit status 0 when the watched process has ended, or as a worker."""
    name, watched = sys.argv[1], int(sys.argv[2])
    try:
        watched_fd = os.pidfd_open(watched)
    except ProcessLookupError:
        return 0
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + name)
    listener.listen(64)  # whoever asks meanwhile waits here
    setproctitle("switchyard: nursery")  # also so that it knows where titles go before a worker's environment changes
    _import_everything()
    return Nursery(listener, watched_fd, _be_a_worker).run()


class Nursery:
    """The loop of the process. run() returns the exit status, in forked workers too, which is what `work` returns."""

    def __init__(self, listener: socket.socket, watched_fd: int, work: Callable[[], int]) -> None:
        self._work = work
        self._listener = listener
        self._watched_fd = watched_fd
        self._workers: dict[int, _Worker] = {}
        self._deaths, self._death_bell = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._is_ending = False

    def run(self) -> int:
        """Until the watched process has ended and no worker is left."""
        for end in (self._deaths, self._death_bell):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._death_bell.fileno(), warn_on_full_buffer=False)
        for each in (self._listener, self._deaths, self._watched_fd):
            self._selector.register(each, selectors.EVENT_READ)
        while self._workers or not self._is_ending:
            for key, _ in self._selector.select(timeout=1.0):
                if key.fileobj is self._listener:
                    if self._accept():
                        return self._work()
                elif key.fileobj is self._deaths:
                    with contextlib.suppress(BlockingIOError):
                        self._deaths.recv(4096)
                elif key.fileobj == self._watched_fd:
                    self._selector.unregister(self._watched_fd)
                    self._is_ending = True  # clients that outlive it have their workers until they end
                else:
                    self._orphan(key.fileobj)
            self._bury()
            self._kill_orphans()
        return 0

    def _accept(self) -> bool:
        """Fork the worker that a client asks for. True in the worker."""
        connection, _ = self._listener.accept()
        descriptors: list[int] = []
        try:
            if peer_user(connection) != os.getuid():
                raise PermissionError("a process of another user")
            connection.settimeout(_REQUEST_LIMIT_S)
            request, descriptors, _, _ = socket.recv_fds(connection, _REQUEST_LIMIT_BYTES, 3)
            while not request.endswith(b"\n"):
                more = connection.recv(_REQUEST_LIMIT_BYTES)
                if not more:
                    raise ConnectionError("the client left")
                request += more
            environment = json.loads(request)["environment"]
            if len(descriptors) != 3:
                raise ValueError("three descriptors are wanted")
            pid = self._fork(connection, environment, descriptors)
        except (OSError, ValueError, KeyError) as error:
            print(f"nursery: a request was refused: {error}", file=sys.stderr, flush=True)
            connection.close()
            return False
        finally:
            for each in descriptors:
                os.close(each)
        return pid == 0

    def _fork(self, connection: socket.socket, environment: dict[str, str], descriptors: list[int]) -> int:
        if (threads := len(list(Path("/proc/self/task").iterdir()))) != 1:
            print(f"nursery: forking with {threads} threads is not safe", file=sys.stderr, flush=True)
        pid = os.fork()
        if pid == 0:
            self._forget(connection)
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
            os.environ.clear()
            os.environ.update(environment)
            return 0
        pidfd = os.pidfd_open(pid)  # it is not reaped before _bury, so this is that process and no other
        self._workers[pid] = _Worker(connection)
        self._selector.register(connection, selectors.EVENT_READ)
        try:
            socket.send_fds(connection, [json.dumps({"pid": pid}).encode() + b"\n"], [pidfd])
        except OSError:
            self._orphan(connection)
        finally:
            os.close(pidfd)
        return pid

    def _forget(self, connection: socket.socket) -> None:
        """In the worker: close all that is the nursery's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        os.close(self._watched_fd)
        others = (worker.connection for worker in self._workers.values())
        for each in (self._listener, self._deaths, self._death_bell, connection, *others):
            each.close()

    def _orphan(self, connection: object) -> None:
        for worker in self._workers.values():
            if worker.connection is connection:
                worker.orphaned_at_s = time.monotonic()
                self._selector.unregister(worker.connection)

    def _bury(self) -> None:
        while self._workers:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            worker = self._workers.pop(pid)
            if worker.orphaned_at_s is None:
                self._selector.unregister(worker.connection)
            with contextlib.suppress(OSError):
                worker.connection.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
            worker.connection.close()

    def _kill_orphans(self) -> None:
        now_s = time.monotonic()
        for pid, worker in self._workers.items():
            if worker.orphaned_at_s is not None and now_s - worker.orphaned_at_s > _ORPHAN_LIMIT_S:
                os.kill(pid, signal.SIGKILL)


def _be_a_worker() -> int:
    from model import worker_main

    setproctitle("switchyard: expert worker")
    return worker_main.main()


def _import_everything() -> None:
    """What loading experts and serving them will import, but nothing that starts a thread or asks for a device."""
    importlib.import_module("cluster.sabotage")
    importlib.import_module("cluster.tls")
    importlib.import_module("model.hosted_experts").import_kernels()
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, pages that forks share


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # vLLM's end of the interpreter takes two seconds, in which a drained worker keeps its memory
