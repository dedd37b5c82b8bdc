"""The order of things in a comparison, with servers that only write down what is done to them."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
import yaml

from cluster.config import parse_settings
from ops.bench import compare, report, sides
from ops.bench.load import LevelRun, LoadError, Trace, Workload
from tests.golden import GOLDENS


class FakeServer:
    """Knows whether it is frozen; the diary is shared by both sides."""

    base_url = "http://127.0.0.1:9"
    model = "m"

    def __init__(self, name: str, diary: list[str]):
        self.name, self.diary, self.is_frozen = name, diary, False

    def thaw(self) -> None:
        self.is_frozen = False
        self.diary.append(f"thaw {self.name}")

    def freeze(self) -> None:
        self.is_frozen = True
        self.diary.append(f"freeze {self.name}")

    def cpu_s(self) -> float:
        return 0.0

    def check_alive(self) -> None:
        """It lives."""

    def log_tail(self) -> str:
        return "the log's end"


class Diary:
    """A comparison whose servers are fakes, and what happened in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.entries: list[str] = []
        self.up: dict[str, compare.Side] = {}
        plan = compare.Plan((1, 8), 2, 2, Workload(100), sequential=False, start_timeout_s=1.0)
        settings = parse_settings(sides.bench_args("m", num_workers=1, dtype="bfloat16", streams=8, tokens=96))
        self.comparison = compare.Comparison(plan, settings, {}, Path())
        counters = itertools.count(1)
        stages = {f"{stage}_ns": 0 for stage in report.STAGES}
        reading = {"tokens": 0, **stages}
        monkeypatch.setattr(
            compare.Side,
            "stats",
            lambda side: {"calls": next(counters), **reading} if side.name != "colocated" else None,
        )
        monkeypatch.setattr(self.comparison, "_started", self.started)
        monkeypatch.setattr(compare, "run_level", self.run_level)

    @contextlib.contextmanager
    def started(self, name: str):
        self.entries.append(f"start {name}")
        self.up[name] = compare.Side(name, FakeServer(name, self.entries))
        yield self.up[name]
        del self.up[name]
        self.entries.append(f"stop {name}")

    def run_level(self, base_url, model, workload, streams, num_requests) -> LevelRun:
        (awake,) = [side.name for side in self.up.values() if not side.server.is_frozen]
        if num_requests != streams:  # not a warm-up
            self.entries.append(f"{awake} {streams}")
        speed = 0.5 if awake == "switchyard" else 1.0
        return LevelRun(streams, 2.0 / speed, 0.0, [Trace(0.0, [1.0 / speed, 2.0 / speed], 2)])


@pytest.fixture
def diary(monkeypatch) -> Diary:
    return Diary(monkeypatch)


def test_only_one_side_runs_at_a_time_and_the_order_alternates(diary):
    diary.comparison.run()
    ours = ["start switchyard", "switchyard 1", "switchyard 8", "stop switchyard"]
    theirs = ["thaw colocated", "colocated 1", "colocated 8", "freeze colocated"]
    assert diary.entries == ["start colocated", "freeze colocated", *theirs, *ours, *ours, *theirs, "stop colocated"]


def test_what_was_measured_is_paired_by_round_and_level(diary):
    diary.comparison.run()
    assert [(pair.round, pair.streams, pair.ratio("throughput")) for pair in diary.comparison.pairs] == [
        (1, 1, 0.5),
        (1, 8, 0.5),
        (2, 1, 0.5),
        (2, 8, 0.5),
    ]
    assert {streams: len(each) for streams, each in diary.comparison.layer_calls.items()} == {1: 2, 8: 2}
    assert all(reading for each in diary.comparison.layer_calls.values() for reading in each)


def test_a_failed_measurement_is_reported_with_the_log_and_stops_everything(diary, monkeypatch):
    def run_level(*_):
        raise LoadError("answered 503")

    monkeypatch.setattr(compare, "run_level", run_level)
    with pytest.raises(compare.MeasurementFailed, match=r"colocated: answered 503\nthe log's end"):
        diary.comparison.run()


def test_experts_are_converted_beside_the_model_and_served_under_its_name(tmp_path, monkeypatch):
    shutil.copytree(GOLDENS / "mixtral-tiny", tmp_path / "model")
    folder = compare._converted(tmp_path / "model", "int4")
    assert folder == str(tmp_path / "model-int4")
    assert json.loads((tmp_path / "model-int4/config.json").read_text())["quantization_config"]
    assert compare._converted(tmp_path / "model", "int4") == folder  # verified, not written again
    settings = parse_settings({"model": str(tmp_path / "model")})
    plan = compare.Plan((1,), 1, 1, Workload(100, 4, 4, 0), False, 1.0)
    launched = {}
    monkeypatch.setattr(compare, "Server", lambda name, command, *rest: launched.setdefault(name, command))
    comparison = compare.Comparison(plan, settings, {"colocated": {}, "switchyard": {}}, tmp_path, folder)
    comparison._launch("switchyard")
    comparison._launch("colocated")
    served = yaml.safe_load((tmp_path / "ray-config.yaml").read_text())["applications"][0]["args"]
    assert (served["model"], served["served_model_name"]) == (folder, "model")
    assert str(tmp_path / "model") in launched["colocated"]
