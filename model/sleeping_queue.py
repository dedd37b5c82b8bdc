"""vLLM's EngineCore asleep while its worker computes.

The two talk through a queue in shared memory. Its reader, for a second after every message, looks again and again with
sched_yield in between (vllm/distributed/device_communicators/shm_broadcast.py, SpinCondition): in an engine under load
that is always, and on cores that kernels compute on it takes up to a third of one from them. The queue also announces
every message on a socket, which the reader otherwise sleeps on; here it always does.
"""

import functools
import time

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.platforms import current_platform

# An announcement may be lost; vLLM's own reader then finds the message within 5 s.
_RECHECK_MS = 2
_RECENTLY_S = 1.0


@functools.cache
def register() -> None:
    """Have this process's queues sleep, on CPUs; elsewhere kernels do not compete with the reader. Idempotent."""
    if not current_platform.is_cpu():
        return
    make, wait = SpinCondition.__init__, SpinCondition.wait

    def make_without_busy_loop(self, is_reader, context, notify_address, busy_loop_s=0.0):
        make(self, is_reader, context, notify_address, busy_loop_s=0.0)

    def wait_but_recheck(self, timeout_ms=None):
        if time.monotonic() < self.last_read + _RECENTLY_S:
            timeout_ms = _RECHECK_MS if timeout_ms is None else min(timeout_ms, _RECHECK_MS)
        wait(self, timeout_ms)

    SpinCondition.__init__ = make_without_busy_loop
    SpinCondition.wait = wait_but_recheck
