"""The end of a process that vLLM has started by multiprocessing: an EngineCore, or one of its workers.

Two things are wanted of it that vLLM 0.32 leaves open. It shall not outlive its parent: EngineCore ends when it is told
to, a worker at the end of its step, but a replica that was killed tells nobody, and a step that waits for experts has
no end. And it shall end soon: taking the interpreter apart takes seconds, one process after the other, and after five
of them EngineCore is killed while it waits for its workers.
"""

import atexit
import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import signal
import sys
import threading

_LAST = -(1 << 20)  # after all other finalizers, and after children of its own have been waited for

_watching_pid: int | None = None
_is_fork = False


def _after_fork() -> None:
    global _is_fork
    _is_fork = True


os.register_at_fork(after_in_child=_after_fork)


def end_well() -> None:
    """From now on this process is killed when its parent ends, and ends at once when its work is done. Idempotent.

    Exit functions run and streams are flushed, the exit status is as ever; only objects are not torn down. A process
    that multiprocessing has not started is left alone.
    """
    global _watching_pid
    parent = multiprocessing.parent_process()
    if parent is None or _watching_pid == os.getpid():  # a fork has the variable, and no thread
        return
    _watching_pid = os.getpid()
    threading.Thread(target=_end_with, args=(parent,), name="end-with-parent", daemon=True).start()
    # A fork ends like that by itself, and the exit functions that it has inherited are its parent's.
    if "--multiprocessing-fork" in sys.orig_argv and not _is_fork:
        multiprocessing.util.Finalize(None, _end_at_once, exitpriority=_LAST)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _end_at_once() -> None:
    """At the end of multiprocessing's exit function, which runs while what has ended the process is in flight."""
    error = sys.exc_info()[1]
    if error is not None and not isinstance(error, SystemExit):
        return  # multiprocessing tells what it was
    status = 0 if error is None or error.code is None else error.code
    if not isinstance(status, int):
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
