"""Cleaning up after ourselves: adopt orphans while running, and end every descendant at the end."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose parent dies, so that none can get away (prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(patience_s: float) -> list[str]:
    """Terminate every descendant of this process, then kill what is left; returns the names of those alive at first."""
    ended: list[str] = []
    for signal_number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, patience_s)):
        alive = _living(psutil.Process().children(recursive=True))
        if not alive:
            break
        ended = ended or [_name(process) for process in alive]
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal_number)
        deadline_s = time.monotonic() + wait_s
        while _living(psutil.Process().children(recursive=True)) and time.monotonic() < deadline_s:
            reap()
            time.sleep(0.05)
    reap()
    return ended


def reap() -> None:
    """Collect the exit statuses of adopted orphans, which would stay as zombies."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    living = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return "?"
