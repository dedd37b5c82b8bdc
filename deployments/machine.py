"""What this machine has, for a plan: GPUs by the driver's names, free memory, and measured rates of the host.

survey() runs on every node of a Ray cluster (`switchyard plan --ray`), or here.
"""

import re
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil

from cluster.errors import ConfigError
from cluster.inventory import GB, KNOWN_GPUS, known_gpu

_QUERY = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
_READ_FLOATS = 64 << 20
_MATRIX = 1024
_TRIES = 3


def node_name() -> str:
    """This machine's name as a plan uses it: the host name without what a Ray label may not have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname()).strip("-_")[:42] or "this-machine"


def survey() -> dict[str, Any]:
    """This machine as a node of an inventory (cluster/inventory.py). Takes about a second."""
    node: dict[str, Any] = {
        "name": node_name(),
        "host": {
            "memory_gb": round(psutil.virtual_memory().available / GB, 1),
            "bandwidth_gb_s": round(_read_bytes_s() / GB, 1),
            "bf16_tflops": round(_matmul_flops() / 1e12, 4),
        },
    }
    gpus = gpus_of(_driver_names())
    return {**node, "gpus": gpus} if gpus else node


def gpus_of(names: list[str]) -> dict[str, Any] | None:
    """The `gpus` of a node by its driver's names; None without. Raises ConfigError for unknown or unlike cards."""
    if not names:
        return None
    kinds = {known_gpu(name) for name in names}
    if len(set(names)) > 1 or None in kinds:
        raise ConfigError(
            f"the GPUs of {node_name()} ({', '.join(sorted(set(names)))}) are not of one kind that is known "
            f"({', '.join(KNOWN_GPUS)}): describe the machines in a file and give it with --inventory."
        )
    return {"kind": kinds.pop(), "count": len(names)}


def _driver_names() -> list[str]:
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # no driver, or no card
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _read_bytes_s() -> float:
    """How fast all threads together read memory."""
    import torch

    numbers = torch.ones(_READ_FLOATS, dtype=torch.float32)
    return numbers.nbytes / _best_s(lambda: numbers.sum())


def _matmul_flops() -> float:
    """In float32: PyTorch's own bfloat16 product is slow where it lacks oneDNN, and vLLM's kernels are not slower."""
    import torch

    a, b = (torch.ones(_MATRIX, _MATRIX) for _ in range(2))
    return 2 * _MATRIX**3 / _best_s(lambda: a @ b)


def _best_s(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(_TRIES + 1):  # the first one warms up
        begin_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin_s)
    return min(times[1:])
