"""Energy from counters that are files and from a fake NVML, and what `switchyard energy` makes of it."""

from pathlib import Path

import pytest

from cluster.energy import EnergyMeter, GpuCounters, rapl_zones, visible_gpus
from ops.energy import Use, render, uses

RANGE_UJ = 1_000_000_000


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, memory of the first, cores of the first (a part of it), and the whole platform."""
    names = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
    for zone, name in names.items():
        folder = tmp_path / f"intel-rapl:{zone}"
        folder.mkdir()
        (folder / "name").write_text(name + "\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
        (folder / "energy_uj").write_text("0\n")
    return tmp_path


def spend(powercap: Path, **joules: float) -> None:
    """Joules by zone, written 0_1 for 0:1. Counters wrap."""
    for zone, amount in joules.items():
        file = powercap / f"intel-rapl:{zone.removeprefix('z').replace('_', ':')}" / "energy_uj"
        file.write_text(str((int(file.read_text()) + int(amount * 1e6)) % RANGE_UJ))


class Clock:
    """CPU seconds of a process and of its host."""

    def __init__(self) -> None:
        self.own_s = self.host_s = 0.0

    def meter(self, powercap: Path, gpus: GpuCounters | None = None) -> EnergyMeter:
        return EnergyMeter(rapl_zones(powercap), gpus, lambda: self.own_s, lambda: self.host_s)


def test_packages_and_memory_count_once_and_by_share_of_cpu_time(powercap):
    clock = Clock()
    meter = clock.meter(powercap)
    spend(powercap, z0=10, z0_0=9, z0_1=2, z1=8, z2=25)
    clock.own_s, clock.host_s = 1.0, 4.0
    assert meter.read() == {"nvml": None, "rapl": pytest.approx((10 + 2 + 8) / 4)}
    spend(powercap, z0=100)
    clock.host_s = 5.0
    assert meter.read()["rapl"] == pytest.approx(5.0)


def test_a_counter_that_wraps_goes_on(powercap):
    clock = Clock()
    spend(powercap, z0=999)
    meter = clock.meter(powercap)
    spend(powercap, z0=3)
    clock.own_s = clock.host_s = 1.0
    assert meter.read()["rapl"] == pytest.approx(3.0)


def test_nothing_to_read_is_not_measured(tmp_path, powercap):
    assert rapl_zones(tmp_path / "none") == []
    (powercap / "intel-rapl:1" / "energy_uj").unlink()  # as if it might not be read
    assert Clock().meter(powercap).read() == {"nvml": None, "rapl": None}


class FakeNvml:
    """nvidia-ml-py, as far as it is used. Millijoules since the driver was loaded."""

    def __init__(self) -> None:
        self.spent_mj = {0: 5000, 1: 70_000, "GPU-b": 0}
        self.is_on = False

    def nvmlInit(self) -> None:  # noqa: N802
        self.is_on = True

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int | str) -> int:  # noqa: N802
        assert self.is_on
        return self.spent_mj[handle]


def test_gpus_count_those_that_are_visible_by_the_reserved_share():
    nvml = FakeNvml()
    gpus = GpuCounters(nvml, visible_gpus(nvml, {"CUDA_VISIBLE_DEVICES": "1,GPU-b"}), 0.5)
    meter = EnergyMeter([], gpus, float, float)
    nvml.spent_mj.update({0: 99_000, 1: 72_000, "GPU-b": 500})
    assert meter.read() == {"nvml": pytest.approx(1.25), "rapl": None}
    assert visible_gpus(nvml, {}) == []


def key(name: str, **labels: str):
    return name, tuple(sorted(labels.items()))


def test_use_is_what_has_grown():
    tokens, layer_tokens = "vllm:generation_tokens_total", "switchyard_worker_tokens_total"
    joules = "switchyard_energy_joules_total"
    before = {key(tokens, model_name="m", engine="e"): 100.0, key(joules, kind="engine", id="e", source="rapl"): 50.0}
    after = {
        key(tokens, model_name="m", engine="e"): 140.0,
        key(joules, kind="engine", id="e", source="rapl"): 60.0,
        key(joules, kind="worker", id="r", source="rapl"): 10.0,
        key(layer_tokens, shard="0", replica="r"): 80.0,
        key(layer_tokens, shard="1", replica="new"): 8.0,
    }
    models, workers = uses(before, after)
    assert models == [Use("m", 40.0, 20.0)] and models[0].joules_per_token == 0.5
    assert models[0].tokens_per_kwh == 7_200_000
    assert workers == [Use("new", 8.0, None), Use("r", 80.0, 10.0)]
    text = render(models, workers)
    assert "not measured" in text[4] and "7.2e+06" in text[1]


def test_no_joules_and_no_tokens_are_told_apart():
    assert Use("m", 10, None).joules_per_token is None and "not measured" in render([Use("m", 10, None)], [])[1]
    assert Use("m", 0, 5.0).joules_per_token is None and "not measured" not in render([Use("m", 0, 5.0)], [])[1]
