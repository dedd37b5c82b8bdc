"""The energy that an engine or a worker takes, where the machine can tell: NVML for GPUs, RAPL for CPUs and memory.

A GPU's energy is its processes' by their reserved share. RAPL knows packages only, so a process gets the part of its
host's packages that its CPU time has of all CPU time there: an attribution, not a measurement of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
SOURCES = ("nvml", "rapl")


class RaplZone:
    """One energy counter that wraps around (Linux, Documentation/power/powercap/powercap.rst)."""

    def __init__(self, folder: Path) -> None:
        self._counter = folder / "energy_uj"
        self._range_uj = int((folder / "max_energy_range_uj").read_text())
        self._last_uj = self._read()

    def _read(self) -> int:
        return int(self._counter.read_text())

    def advance_j(self) -> float:
        """Joules since the last call, or since the beginning."""
        now_uj = self._read()
        delta_uj = now_uj - self._last_uj
        self._last_uj = now_uj
        return (delta_uj if delta_uj >= 0 else delta_uj + self._range_uj) / 1e6


def rapl_zones(root: Path = POWERCAP) -> list[RaplZone]:
    """Packages and their memory; empty where there is no RAPL or it may not be read (its files are root's by default).

    Cores and uncore are parts of a package, and psys contains it: to add them would count twice.
    """
    zones = []
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            if (folder / "name").read_text().strip().startswith(("package", "dram")):
                zones.append(RaplZone(folder))
        except (OSError, ValueError):
            return []
    return zones


def visible_gpus(nvml: Any, environment: Mapping[str, str]) -> list[Any]:
    """NVML's handles of the GPUs in CUDA_VISIBLE_DEVICES (numbers or UUIDs). Raises nvml.NVMLError."""
    nvml.nvmlInit()
    names = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
    ]


class GpuCounters:
    """The GPUs of one process. `share` is the part of them that was reserved for it, at most 1."""

    def __init__(self, nvml: Any, handles: Sequence[Any], share: float) -> None:
        self._nvml, self._handles, self._share = nvml, handles, min(share, 1.0)
        self._last_mj = self._read()

    def _read(self) -> int:
        return sum(int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in self._handles)

    def advance_j(self) -> float:
        """Joules since the last call, or since the beginning."""
        last_mj, self._last_mj = self._last_mj, self._read()
        return (self._last_mj - last_mj) / 1000 * self._share


class EnergyMeter:
    """Adds up one process's energy. `cpu_s` and `host_cpu_s` are CPU seconds so far, of it and of its whole host."""

    def __init__(
        self,
        zones: Sequence[RaplZone],
        gpus: GpuCounters | None,
        cpu_s: Callable[[], float],
        host_cpu_s: Callable[[], float],
    ) -> None:
        self._zones, self._gpus = zones, gpus
        self._cpu_s, self._host_cpu_s = cpu_s, host_cpu_s
        self._last = (cpu_s(), host_cpu_s()) if zones else (0.0, 0.0)
        self._joules = {"nvml": 0.0, "rapl": 0.0}

    def read(self) -> dict[str, float | None]:
        """Joules since the beginning by source; None where that is not measured."""
        if self._gpus is not None:
            self._joules["nvml"] += self._gpus.advance_j()
        if self._zones:
            self._joules["rapl"] += sum(zone.advance_j() for zone in self._zones) * self._part()
        is_measured = {"nvml": self._gpus is not None, "rapl": bool(self._zones)}
        return {source: self._joules[source] if is_measured[source] else None for source in SOURCES}

    def _part(self) -> float:
        """This process's part of the CPU time since the last call."""
        (last_s, host_last_s), self._last = self._last, (self._cpu_s(), self._host_cpu_s())
        busy_s = self._last[1] - host_last_s
        return min(1.0, max(0.0, self._last[0] - last_s) / busy_s) if busy_s > 0 else 0.0


def gpu_counters(share: float) -> GpuCounters | None:
    """This process's GPUs; None without any, or where NVML is not installed or does not answer."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        handles = visible_gpus(pynvml, os.environ)
        return GpuCounters(pynvml, handles, share) if handles else None
    except pynvml.NVMLError:
        return None
