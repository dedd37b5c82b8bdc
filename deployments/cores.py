"""Which cores the kernels of engines and workers use: pure functions of the host's cores and the settings."""

import itertools
import os
from collections.abc import Sequence

from cluster.config import Settings
from cluster.layout import neighbours


def allowed_cores() -> tuple[int, ...]:
    """Numbers of the cores that this process may run on, ascending."""
    return tuple(sorted(os.sched_getaffinity(0)))


def engine_cores(settings: Settings, cores: Sequence[int]) -> tuple[int, ...]:
    """An engine computes while its workers wait and the other way round, so by default it uses every core."""
    return tuple(cores[: settings.engine.threads or len(cores)])


def worker_cores(settings: Settings, shard_id: int, cores: Sequence[int]) -> tuple[int, ...]:
    """All shards of a host compute a layer at the same time, so by default they divide its cores among them."""
    if settings.layout is None:
        place, sharing = shard_id, settings.workers
    else:
        together = neighbours(settings.layout, shard_id)
        place, sharing = together.index(shard_id), len(together)
    count = min(settings.worker.threads or max(1, len(cores) // sharing), len(cores))
    first = place * count % len(cores)
    return tuple(sorted((*cores, *cores)[first : first + count]))


def omp_binding(cores: Sequence[int], ranks: int) -> str:
    """VLLM_CPU_OMP_THREADS_BIND: cores of each of vLLM's ranks, split as evenly as possible."""
    ranks = max(1, min(ranks, len(cores)))
    bounds = [len(cores) * rank // ranks for rank in range(ranks + 1)]
    return "|".join(",".join(map(str, cores[low:high])) for low, high in itertools.pairwise(bounds))
