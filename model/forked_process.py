"""vLLM's EngineCore and its workers as forks of the node's nursery (model/nursery.py), not newly started Pythons.

Importing vLLM takes ten seconds of a core and more; an engine does so three times, one after the other: in its
replica, in EngineCore and in each worker. The nursery has imported it already.

vLLM starts both through a multiprocessing context. NurseryContext is one whose processes are forks of the nursery: what
multiprocessing sends to a newly started process (multiprocessing.spawn) arrives at the fork as its standard input, and
descriptors that its arguments carry travel along. On GPUs vLLM's own way stays: there forks of a process that knows
devices were never tried.
"""

import contextlib
import io
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from multiprocessing import (
    connection,
    context,
    popen_fork,
    popen_spawn_posix,
    process,
    reduction,
    resource_tracker,
    spawn,
    util,
)

from model import nursery_client

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 1.0
_UNKNOWN_STATUS = 255  # of a process whose nursery did not live to tell; as multiprocessing's forkserver has it
_BOUND_CORES = "GOMP_CPU_AFFINITY"  # set by vLLM around the start of a worker (vllm/utils/ompmultiprocessing.py)

_inherited: Sequence[int] = ()


class _Descriptor:
    """A descriptor in the arguments of a process, by its place among those that travel along."""

    def __init__(self, index: int) -> None:
        self._index = index

    def detach(self) -> int:
        return _inherited[self._index]


class _Popen(popen_fork.Popen):
    """What multiprocessing wants to know of a process. `sentinel` is its pidfd: readable when it has ended."""

    method = "nursery"
    DupFd = _Descriptor

    def __init__(self, started: process.BaseProcess, nursery: socket.socket) -> None:
        self._nursery = nursery
        self._asking = threading.Lock()
        self._descriptors: list[int] = []
        super().__init__(started)

    def duplicate_for_child(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        return len(self._descriptors) - 1

    def _launch(self, started: process.BaseProcess) -> None:
        preparation = spawn.get_preparation_data(started.name)
        for name in ("init_main_from_name", "init_main_from_path"):  # the replica's main module is Ray's
            preparation.pop(name, None)
        message = io.BytesIO()
        context.set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            reduction.dump(preparation, message)
            reduction.dump(started, message)
        finally:
            context.set_spawning_popen(None)
        theirs, ours = os.pipe()
        try:
            descriptors = (theirs, 1, 2, _resource_tracker(), *self._descriptors)
            fork = nursery_client.ask(self._nursery, nursery_client.PROCESS, os.environ, descriptors)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self.pid, self.sentinel = fork.pid, fork.pidfd
        # The child takes the other end's closing for this process' end.
        self.finalizer = util.Finalize(self, _close, (ours, self.sentinel, self._nursery))
        with open(ours, "wb", closefd=False) as pipe:
            pipe.write(message.getbuffer())

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            if not connection.wait([self.sentinel], 0 if flag == os.WNOHANG else None):
                return None
            with self._asking:  # vLLM watches its processes in a thread
                if self.returncode is None:
                    self.returncode = self._last_words()
        return self.returncode

    def _last_words(self) -> int:
        try:
            self._nursery.settimeout(_LAST_WORDS_S)
            return int(json.loads(self._nursery.recv(4096))["status"])
        except (OSError, ValueError):
            return _UNKNOWN_STATUS

    def _send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and nobody has asked yet
                signal.pidfd_send_signal(self.sentinel, number)


class _Process(process.BaseProcess):
    _start_method = "spawn"  # what its own children get that ask for no context

    @staticmethod
    def _Popen(started: process.BaseProcess) -> popen_fork.Popen:  # noqa: N802  # multiprocessing's name
        nursery = nursery_client.connect(os.environ[nursery_client.NURSERY])
        if nursery is None:
            logger.warning("this node's nursery has ended: %s starts without it, and takes longer", started.name)
            return popen_spawn_posix.Popen(started)
        return _Popen(started, nursery)


class NurseryContext(context.SpawnContext):
    """A multiprocessing context. start() raises NurseryFailed when the nursery does not do what it is for."""

    Process = _Process  # type: ignore[assignment]


def use_nursery() -> None:
    """From now on this process, if its node has a nursery, has vLLM's processes forked there. Idempotent."""
    from vllm.platforms import current_platform
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    if not current_platform.is_cpu() or nursery_client.NURSERY not in os.environ:
        return
    for module in (utils, multiproc_executor):
        module.get_mp_context = NurseryContext


def run(descriptors: Sequence[int]) -> int:
    """In the fork: be the process that standard input describes. Returns its exit status."""
    global _inherited
    resource_tracker._resource_tracker._fd, *_inherited = descriptors  # type: ignore[attr-defined]
    if cores := os.environ.get(_BOUND_CORES):
        from model.kernel_threads import start_kernel_threads

        start_kernel_threads([int(core) for core in cores.split()])
    message, parent = os.dup(0), os.dup(0)
    return int(spawn._main(message, parent))


def _close(ours: int, sentinel: int, nursery: socket.socket) -> None:
    os.close(ours)
    os.close(sentinel)
    nursery.close()


def _resource_tracker() -> int:
    """The descriptor by which this process' tracker is told of semaphores and shared memory."""
    descriptor = resource_tracker.getfd()
    assert descriptor is not None
    return descriptor
