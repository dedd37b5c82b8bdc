"""A process that was started by multiprocessing, and that has nothing to do once its parent is gone."""

import multiprocessing
import multiprocessing.process
import os
import signal
import threading

_watching_pid: int | None = None


def end_with_parent() -> None:
    """From now on this process is killed when its parent ends, whatever it does then. Idempotent.

    vLLM 0.32's EngineCore ends when it is told to and its workers at the end of their step. A replica that was killed
    tells nobody, and a step that waits for experts has no end. A process without such a parent is left alone.
    """
    global _watching_pid
    parent = multiprocessing.parent_process()
    if parent is None or _watching_pid == os.getpid():  # a fork has the variable, and no thread
        return
    _watching_pid = os.getpid()
    threading.Thread(target=_wait_and_end, args=(parent,), name="end-with-parent", daemon=True).start()


def _wait_and_end(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
