"""Constants are fitted from runs, and a simulation with them gives the runs again that they were made from."""

import json

import pytest

from cluster.errors import ConfigError
from cluster.workload import Workload
from ops.bench.constants import constants, costs_of
from ops.bench.fit import comparison, divided, fit, read_runs
from ops.cli import main
from ops.plan_file import read_plan


@pytest.fixture
def plan(tmp_path, capsys):
    inventory = tmp_path / "inventory.yaml"
    inventory.write_text("nodes: [{name: here, host: {memory_gb: 16, bandwidth_gb_s: 20, bf16_tflops: 1}}]\n")
    assert main(["plan", "--model", "demo", "--inventory", str(inventory), "--json"]) == 0
    path = tmp_path / "plan.json"
    path.write_text(capsys.readouterr().out)
    return path


def made(streams: int, workers: int = 1) -> dict:
    """A run of the demo model: 6 layers; 500 us beside the kernel and 10 more for each token, 4 ms a step."""
    compute_us = 300.0
    call_us = 500 + 10 * streams + compute_us
    call = {"tokens_per_call": streams, "gather_us": 100.0 * workers, "send_us": 10.0, "combine_us": 20.0}
    front_us = call["gather_us"] + 30
    call |= {"wait_us": call_us - front_us, "compute_us": compute_us}
    itl_ms = (6 * call_us + 4000 + 200 * streams) / 1e3
    return {"workers": workers, "streams": streams, "throughput": streams / itl_ms * 1e3, "itl_ms": itl_ms,
            "layer_call": call}  # fmt: skip


def test_what_was_put_in_comes_out(plan):
    cluster = read_plan(plan)
    values = fit([made(1), made(16), made(1, workers=3)], cluster)
    assert values["call_us"] == pytest.approx(500, abs=1) and values["call_token_us"] == pytest.approx(10, abs=0.1)
    assert values["message_us"] == pytest.approx(100)
    assert 0 < values["step_us"] < 4000 and values["step_request_us"] == pytest.approx(200, rel=0.1)
    assert 0.1 < values["kernel_efficiency"] < 1.5
    lines = list(comparison([made(1), made(16)], cluster, {**values, "notice_s": 1}, Workload(6.0, 1.0, 1)))
    assert len(lines) == 3 and all("%" in line for line in lines[1:])


def test_a_machine_is_divided_among_workers(plan):
    halves = divided(read_plan(plan), 3)
    assert [(s.first_expert, s.end_expert) for s in halves.shards] == [(0, 3), (3, 6), (6, 8)]
    assert sum(s.workers[0][1].bandwidth_bytes_s for s in halves.shards) == pytest.approx(20e9)


def test_the_command_prints_constants_that_simulate_takes(plan, tmp_path, capsys):
    runs, fitted, load = (tmp_path / name for name in ("runs", "fitted.yaml", "load.yaml"))
    runs.write_text("\n".join(json.dumps(each) for each in (made(1), made(16))))
    assert main(["bench", "fit", "--runs", str(runs), "--plan", str(plan)]) == 0
    fitted.write_text(capsys.readouterr().out)
    load.write_text("{duration_s: 3, streams: 1, output_tokens: 8}")
    words = ["simulate", "--plan", str(plan), "--load", str(load), "--constants"]
    assert main([*words, str(fitted)]) == 0 and "tokens/s" in capsys.readouterr().out
    fitted.write_text("call_us: 1\n")
    assert main([*words, str(fitted)]) == 2 and "is missing" in capsys.readouterr().err


def test_too_few_runs_are_refused(tmp_path):
    path = tmp_path / "runs"
    path.write_text(json.dumps(made(1)))
    with pytest.raises(ConfigError, match="no runs with one worker and at least two"):
        read_runs(path)


def test_the_constants_say_where_they_are_from():
    assert constants()["command"].startswith("switchyard bench ") and constants()["machine"]
    assert 0 < costs_of(constants()).kernel_efficiency <= 1
