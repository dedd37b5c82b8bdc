"""An energy meter (cluster/energy.py) for the processes of an engine or a worker on this host."""

import contextlib
from collections.abc import Sequence

import psutil

from cluster.energy import EnergyMeter, gpu_counters, rapl_zones


def meter_of(processes: Sequence[psutil.Process], num_gpus: float | None) -> EnergyMeter:
    """Of those processes together; `num_gpus` is what was reserved for them, None for whole GPUs."""
    return EnergyMeter(
        rapl_zones(),
        gpu_counters(1.0 if num_gpus is None else num_gpus),
        lambda: sum(map(_cpu_s, processes)),
        _host_cpu_s,
    )


def _cpu_s(process: psutil.Process) -> float:
    """0 for one that has ended: EnergyMeter takes less than before for nothing."""
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _host_cpu_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))
