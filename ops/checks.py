"""What can go wrong before anything is started, each with a message that says what to do."""

import os
import shutil
from typing import TYPE_CHECKING

import psutil

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from deployments.app import Plan

_GIB = 1 << 30
# An engine is three processes that import vLLM (2 GB together), a worker one; Ray itself takes about a gigabyte.
_ENGINE_BYTES = 2 * _GIB
_WORKER_BYTES = _GIB
_RAY_BYTES = _GIB


def check_memory(plan: "Plan", available_bytes: int | None = None) -> None:
    """Raises ConfigError when the checkpoint and the processes around it cannot fit into this machine's free memory."""
    settings = plan.settings
    available = psutil.virtual_memory().available if available_bytes is None else available_bytes
    experts = plan.expert_bytes * settings.replicas
    others = (plan.checkpoint_bytes - plan.expert_bytes) * settings.engines
    processes = _RAY_BYTES + settings.engines * _ENGINE_BYTES
    if plan.spec is not None:
        processes += settings.workers * settings.replicas * _WORKER_BYTES
    cache = int((settings.engine.kv_cache_gib or 0.25) * _GIB) * settings.engines
    needed = experts + others + processes + cache
    if needed > available:
        raise ConfigError(
            f"not enough memory: {available / _GIB:.1f} GiB are free, about {needed / _GIB:.1f} GiB are needed "
            f"(experts {experts / _GIB:.1f}, other weights {others / _GIB:.1f}, processes {processes / _GIB:.1f}, "
            f"KV cache {cache / _GIB:.1f}). Use fewer engines, replicas or workers, a smaller engine.kv_cache_gib, or "
            "more machines."
        )


def check_compiler(plan: "Plan") -> None:
    """Raises ConfigError when torch.compile has no C++ compiler to call on a machine without a GPU."""
    import torch

    compiler = os.environ.get("CXX") or "g++"
    if plan.settings.engine.enforce_eager or torch.cuda.is_available() or shutil.which(compiler):
        return
    raise ConfigError(
        f"no C++ compiler: {compiler} was not found, and vLLM compiles its CPU code when it starts. Install g++, set "
        "CXX to your compiler, or set engine.enforce_eager to true."
    )
