"""Constants are fitted from runs, and a simulation with them gives the runs again that they were made from."""

import dataclasses
import json

import pytest

from cluster.errors import ConfigError
from cluster.inventory import Chip
from cluster.roofline import dense_seconds, expert_seconds
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


LOAD = Workload(6.0, 1.0, 1, prompt_tokens=32, output_tokens=32)


def made(plan, streams: int, workers: int = 1) -> dict:
    """A run of a machine that reaches half of its bandwidth and a quarter of its arithmetic; a layer call takes 500 us
    beside the kernel and 10 more for each token, a step 4 ms and 0.2 ms for each request."""
    cluster = read_plan(plan)
    model, chip = cluster.model, cluster.engine.chip
    reached = Chip(chip.memory_bytes, chip.bandwidth_bytes_s * 0.5, chip.flops * 0.25)
    engine = dataclasses.replace(cluster.engine, chip=reached)

    def kernel_us(tokens: int) -> float:
        return expert_seconds(model, reached, model.num_experts, tokens) * 1e6

    tokens_per_call = streams * 63 / 32
    compute_us = (kernel_us(32 * streams) + 31 * kernel_us(streams)) / 32
    call = {"tokens_per_call": tokens_per_call, "gather_us": 100.0 * workers, "send_us": 10.0, "combine_us": 20.0}
    call |= {"wait_us": 500 + 10 * tokens_per_call + compute_us - call["gather_us"] - 30, "compute_us": compute_us}
    calls_us = model.num_moe_layers * (500 + 10 * streams + kernel_us(streams))
    itl_ms = (calls_us + dense_seconds(model, engine, streams, 0) * 1e6 + 4000 + 200 * streams) / 1e3
    return {"workers": workers, "streams": streams, "throughput": streams / itl_ms * 1e3, "itl_ms": itl_ms,
            "layer_call": call}  # fmt: skip


def test_what_was_put_in_comes_out(plan):
    cluster = read_plan(plan)
    values = fit([made(plan, 1), made(plan, 16), made(plan, 1, workers=3)], cluster, LOAD)
    assert values["call_us"] == pytest.approx(500, abs=1) and values["call_token_us"] == pytest.approx(10, abs=0.1)
    assert values["message_us"] == pytest.approx(100)
    assert (values["read_efficiency"], values["arithmetic_efficiency"]) == (0.5, 0.25)
    assert values["step_us"] == pytest.approx(4000, rel=0.01)
    assert values["step_request_us"] == pytest.approx(200, rel=0.01)
    lines = list(comparison([made(plan, 1), made(plan, 16)], cluster, {**values, "notice_s": 1}, LOAD))
    assert len(lines) == 3 and all("%" in line for line in lines[1:])


def test_a_machine_is_divided_among_workers(plan):
    halves = divided(read_plan(plan), 3)
    assert [(s.first_expert, s.end_expert) for s in halves.shards] == [(0, 3), (3, 6), (6, 8)]
    assert sum(s.workers[0][1].bandwidth_bytes_s for s in halves.shards) == pytest.approx(20e9)


def test_the_command_prints_constants_that_simulate_takes(plan, tmp_path, capsys):
    runs, fitted, load = (tmp_path / name for name in ("runs", "fitted.yaml", "load.yaml"))
    runs.write_text("\n".join(json.dumps(each) for each in (made(plan, 1), made(plan, 16))))
    assert main(["bench", "fit", "--runs", str(runs), "--plan", str(plan)]) == 0
    fitted.write_text(capsys.readouterr().out)
    load.write_text("{duration_s: 3, streams: 1, output_tokens: 8}")
    words = ["simulate", "--plan", str(plan), "--load", str(load), "--constants"]
    assert main([*words, str(fitted)]) == 0 and "tokens/s" in capsys.readouterr().out
    fitted.write_text("call_us: 1\n")
    assert main([*words, str(fitted)]) == 2 and "is missing" in capsys.readouterr().err


def test_too_few_runs_are_refused(plan, tmp_path):
    path = tmp_path / "runs"
    path.write_text(json.dumps(made(plan, 1)))
    with pytest.raises(ConfigError, match="no runs with one worker and at least two"):
        read_runs(path)


def test_the_constants_say_where_they_are_from():
    assert constants()["command"].startswith("switchyard bench ") and constants()["machine"]
    costs = costs_of(constants())
    assert 0 < costs.read_efficiency <= 1 and 0 < costs.arithmetic_efficiency <= 1
