"""The threads that compute in a worker process, each on a core of its own."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_ELEMENTS_PER_THREAD = 1 << 17  # four times what PyTorch gives one thread at least (GRAIN_SIZE, ATen/Parallel.h)


def start_kernel_threads(cores: Sequence[int]) -> None:
    """Give this process as many kernel threads as there are `cores`, and bind each to its core, this one to the first.

    OpenMP reads its own settings when its library is loaded, which in a forked worker is long past. So the team of
    threads is woken once, and the threads that have come are bound in the order in which they were made.
    """
    torch.set_num_threads(len(cores))
    before = _threads()
    torch.zeros(_ELEMENTS_PER_THREAD * len(cores)).add_(1)
    team = [os.getpid(), *sorted(_threads() - before)]
    if len(team) != len(cores):
        logger.warning("%d kernel threads are not bound to cores: %d were expected", len(team), len(cores))
        return
    for thread, core in zip(team, cores, strict=True):
        os.sched_setaffinity(thread, {core})


def _threads() -> set[int]:
    return {int(each.name) for each in Path("/proc/self/task").iterdir()}
