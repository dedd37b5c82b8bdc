"""Waiting with a whole OpenMP team, so that processes which take turns on the same cores hand them over at once.

An engine and its workers on one host compute alternately, with as many kernel threads as there are cores. Between two
kernels the threads of an OpenMP team spin for milliseconds, for the next one may come any moment; a process that waits
with one thread alone leaves its others spinning on cores that its peer needs now. Here the whole team waits: every
thread but the caller's goes to sleep first, then the caller rings its peer's doorbells and sleeps too, and one event
wakes them all. libgomp is the one that torch has loaded (cluster/gang.c).
"""

from __future__ import annotations

import ctypes
import functools
import os
import select
import time
from collections.abc import Sequence
from typing import Any

import torch

from cluster.native import library

# The team comes back so often, for Python to handle signals; after a second there is nobody to hand cores to.
_TEAM_WAIT_MS = 20
_TEAM_LIMIT_S = 1.0
_MAX_BELLS = 64


class Gang:
    """The OpenMP threads of the thread that makes this object and calls its methods.

    Where the library was not built, or torch computes with one thread, the caller waits alone.
    """

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._fd = epoll.fileno()
        self._num_threads = torch.get_num_threads()
        self._team_wait = _team_wait() if self._num_threads > 1 else None
        self._bells = (ctypes.c_int * _MAX_BELLS)()

    def poll(self, timeout_s: float, max_events: int, bells: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Write to the eventfds `bells`, then wait as epoll.poll() does; a negative timeout is none."""
        if self._team_wait is None or timeout_s == 0 or len(bells) > _MAX_BELLS:
            for bell in bells:
                os.eventfd_write(bell, 1)
            return self._epoll.poll(timeout_s, max_events)
        for i, bell in enumerate(bells):
            self._bells[i] = bell
        team_s = _TEAM_LIMIT_S if timeout_s < 0 else min(_TEAM_LIMIT_S, timeout_s)
        end_s = time.monotonic() + team_s
        left_s, num_bells = team_s, len(bells)
        while left_s > 0:
            wait_ms = min(_TEAM_WAIT_MS, int(left_s * 1000) + 1)
            self._team_wait(self._fd, wait_ms, self._bells, num_bells, self._num_threads)
            if events := self._epoll.poll(0, max_events):
                return events
            num_bells = 0
            left_s = end_s - time.monotonic()
        return self._epoll.poll(timeout_s if timeout_s < 0 else timeout_s - team_s, max_events)


@functools.cache
def _team_wait() -> Any:
    """switchyard_gang_wait; None where the library was not built."""
    native = library()
    if native is None:
        return None
    function = native.switchyard_gang_wait
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int)
    function.restype = None
    return function
