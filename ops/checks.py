"""What can go wrong before anything is started, each with a message that says what to do."""

import os
import shutil
from typing import TYPE_CHECKING

import psutil

from cluster.errors import ConfigError
from cluster.layout import all_nodes, copies, num_workers, reserved_gpus
from cluster.planner import ENGINE_PROCESS_BYTES, RAY_BYTES, WORKER_PROCESS_BYTES

if TYPE_CHECKING:
    from deployments.plan import Plan

_GIB = 1 << 30


def check_memory(plan: "Plan", available_bytes: int | None = None) -> None:
    """Raises ConfigError when the checkpoint and the processes around it cannot fit into this machine's free memory."""
    settings = plan.settings
    available = psutil.virtual_memory().available if available_bytes is None else available_bytes
    experts = int(plan.expert_bytes * copies(settings))
    others = (plan.checkpoint_bytes - plan.expert_bytes) * settings.engines
    processes = RAY_BYTES + settings.engines * ENGINE_PROCESS_BYTES
    if plan.spec is not None:
        processes += num_workers(settings) * WORKER_PROCESS_BYTES
    cache = int((settings.engine.kv_cache_gib or 0.25) * _GIB) * settings.engines
    needed = experts + others + processes + cache
    if needed > available:
        raise ConfigError(
            f"not enough memory: {available / _GIB:.1f} GiB are free, about {needed / _GIB:.1f} GiB are needed "
            f"(experts {experts / _GIB:.1f}, other weights {others / _GIB:.1f}, processes {processes / _GIB:.1f}, "
            f"KV cache {cache / _GIB:.1f}). Use fewer engines, replicas or workers, a smaller engine.kv_cache_gib, or "
            "more machines."
        )


def check_nodes(plan: "Plan", here: str) -> None:
    """Raises ConfigError when the layout names other nodes than `here`, the only one that `switchyard serve` starts."""
    layout = plan.settings.layout
    others = [node for node in all_nodes(layout) if node != here] if layout is not None else []
    if others:
        raise ConfigError(
            f"layout: names {', '.join(others)}, but `switchyard serve` starts this machine ({here}) only. Use "
            "`serve run FILE` on a Ray cluster whose nodes have the label switchyard-node, or plan for this machine."
        )


def check_gpus(plan: "Plan", num_gpus: int | None = None) -> None:
    """Raises ConfigError when engines and workers reserve more GPUs than this machine has: Ray would wait for ever."""
    import torch

    available = torch.cuda.device_count() if num_gpus is None else num_gpus
    engines, workers = reserved_gpus(plan.settings, float(available > 0))
    if plan.spec is None:
        workers = 0
    if engines + workers > available:
        raise ConfigError(
            f"not enough GPUs: {available} here, but the engines reserve {engines:g} and the workers {workers:g}. "
            "worker.num_gpus 0 keeps the experts in host memory; fractions (engine.num_gpus 0.5, worker.num_gpus 0.25) "
            "let several share a GPU, whose memory engine.vllm.gpu_memory_utilization divides."
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
