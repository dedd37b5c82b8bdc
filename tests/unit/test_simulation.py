"""The simulator: what can be worked out by hand, what must hold of any run, and what losses do."""

import dataclasses
import json
import math

import pytest
import yaml

from cluster.config import ExpertScalingSettings
from cluster.errors import ConfigError
from cluster.inventory import Chip
from cluster.roofline import CallCost, EngineLoad, ModelFacts
from cluster.scaling import ShardLoad, ShardScaler
from cluster.simulated import Outcome, impact_of, percentile
from cluster.simulation import Costs, SimCluster, SimShard, simulate
from cluster.workload import Loss, Workload, parse_workload
from ops.cli import main

# One unit of expert takes a millisecond to read; nothing else takes any time.
CHIP = Chip(10**12, 1e9, math.inf)
MODEL = ModelFacts("m", "bf16", 2, 4, 2, 64, 4, 4, expert_bytes=10**6, expert_params=1, dense_bytes=0, dense_params=0,
                   kv_bytes_per_token=0)  # fmt: skip
FREE = Costs(CallCost(0.0, 0.0), 0.0, 0.0, 0.0, 1.0, 1.0, 0.5)
LOAD = Workload(duration_s=2.0, streams=1, prompt_tokens=1, output_tokens=50)


def cluster(shards: tuple[SimShard, ...] = (), engines: int = 1, **changes: object) -> SimCluster:
    shards = shards or (SimShard(0, 2, 0, 4, (("a", CHIP),)),)
    plain = SimCluster(
        MODEL, ("e",) * engines, EngineLoad(engines, 1, CHIP), shards, 64, 2048, math.inf, 0.0
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def split(replicas: int = 1) -> tuple[SimShard, ...]:
    """Two shards of two experts, each on nodes of its own."""
    return tuple(
        SimShard(0, 2, first, first + 2, tuple((f"n{first // 2}{copy}", CHIP) for copy in range(replicas)))
        for first in (0, 2)
    )


def test_a_step_takes_what_its_parts_take():
    """1 token chooses 2 experts in each of 2 layers: 4 ms a step."""
    alone = simulate(cluster(), LOAD, FREE)
    assert alone.itl_mean_s == pytest.approx(4e-3)
    assert alone.tokens_per_s == pytest.approx(1 / alone.itl_mean_s, rel=0.05)
    costs = dataclasses.replace(FREE, call=CallCost(1e-3, 1e-3), step_s=5e-3, step_request_s=1e-3)
    slower = simulate(cluster(), LOAD, costs)
    assert slower.itl_mean_s - alone.itl_mean_s == pytest.approx(2 * 2e-3 + 6e-3, rel=0.05)
    halved = simulate(cluster(), LOAD, dataclasses.replace(FREE, read_efficiency=0.5))
    assert halved.itl_mean_s == pytest.approx(2 * alone.itl_mean_s, rel=0.05)


def test_the_wire_counts_between_nodes_only():
    latency = {"network_latency_s": 1e-3}
    near = simulate(cluster(**latency, engine_nodes=("a",)), LOAD, FREE)
    far = simulate(cluster(**latency), LOAD, FREE)
    assert far.itl_mean_s - near.itl_mean_s == pytest.approx(2 * 2e-3, rel=0.01)


def test_equal_seeds_give_equal_runs_and_others_do_not():
    first = simulate(cluster(split(2), engines=2), dataclasses.replace(LOAD, streams=8), FREE)
    assert first == simulate(cluster(split(2), engines=2), dataclasses.replace(LOAD, streams=8), FREE)
    assert first != simulate(cluster(split(2), engines=2), dataclasses.replace(LOAD, streams=8, seed=1), FREE)


def test_requests_are_conserved_and_long_prompts_take_several_steps():
    load = dataclasses.replace(LOAD, streams=4, prompt_tokens=5000, output_tokens=3)
    run = simulate(cluster(), load, FREE)
    assert run.num_failed == 0 and run.num_completed > 10
    assert run.ttft_p50_s > 3 * run.itl_mean_s / 2
    assert sum(run.curve) >= 3 * run.num_completed


def test_more_engines_more_tokens_until_the_workers_are_busy():
    load = dataclasses.replace(LOAD, streams=16)
    costs = dataclasses.replace(FREE, step_s=20e-3)
    rates = [simulate(cluster(split(), engines=count, max_num_seqs=4), load, costs).tokens_per_s for count in (1, 2, 4)]
    assert rates[0] < rates[1] < rates[2]


def test_a_skewed_load_keeps_one_worker_busier():
    even = simulate(cluster(split()), dataclasses.replace(LOAD, streams=16), FREE)
    skewed = simulate(cluster(split()), dataclasses.replace(LOAD, streams=16, expert_skew=3.0), FREE)
    assert skewed.busiest_worker >= skewed.mean_worker and even.busiest_worker <= 1.0


def test_replicas_for_the_shards_that_are_busy_serve_a_skewed_load_better_than_as_many_elsewhere():
    """The policy that the expert router follows, on simulated workers: one layer, eight shards of one expert each."""
    model = dataclasses.replace(MODEL, num_moe_layers=1, num_experts=8)
    chip = Chip(10**12, math.inf, 2e3)  # a millisecond for each token and expert
    load = dataclasses.replace(LOAD, duration_s=1.0, streams=32, expert_skew=2.0)
    least = dict.fromkeys(range(8), 1)

    def run(replicas: dict[int, int]) -> Outcome:
        shards = tuple(
            SimShard(0, 1, expert, expert + 1, tuple((f"n{expert}-{copy}", chip) for copy in range(count)))
            for expert, count in replicas.items()
        )
        return simulate(cluster(shards, engines=16, model=model), load, FREE)

    settings = ExpertScalingSettings(max_replicas=8, max_workers=12, upscale_delay_s=0.0)
    scaler, wanted = ShardScaler(settings, least, {}), dict(least)
    before = run(wanted)
    for now_s in range(20):
        busy = run(wanted).busy
        loads = {shard: ShardLoad(count, count, sum(busy[shard])) for shard, count in wanted.items()}
        for shard, change in scaler.decide(loads, float(now_s)).items():
            wanted[shard] = change.replicas
    assert sum(wanted.values()) == 12
    calmest = sorted(least, key=lambda shard: before.busy[shard])[:4]
    elsewhere = run({shard: 2 if shard in calmest else 1 for shard in least})
    assert elsewhere.tokens_per_s < 1.1 * before.tokens_per_s
    assert run(wanted).tokens_per_s > 3.0 * before.tokens_per_s


def test_a_loss_with_a_replica_costs_a_moment_and_no_request():
    load = Workload(duration_s=8.0, streams=4, prompt_tokens=1, output_tokens=50, losses=(Loss(3.0, "n00"),))
    runs = [simulate(cluster(split(2)), dataclasses.replace(load, seed=seed), FREE) for seed in range(6)]
    for run in runs:
        assert run.num_failed == 0 and run.impacts[0].recovery_s <= 2 and run.curve[7] > 0
    # A call that was with the lost worker is noticed after half a second; there may have been none.
    assert any(run.curve[3] < 0.8 * run.curve[2] for run in runs)


def test_a_loss_without_a_replica_stops_everything_until_the_node_is_back():
    load = Workload(duration_s=10.0, streams=4, prompt_tokens=1, output_tokens=50, losses=(Loss(2.0, "n00", 4.0),))
    run = simulate(cluster(split()), load, FREE)
    assert run.curve[3] == run.curve[4] == 0 and run.curve[8] > 0 and run.num_failed == 0
    assert run.impacts[0].lowest == 0 and 4 <= run.impacts[0].recovery_s <= 6
    gone = simulate(cluster(split()), dataclasses.replace(load, losses=(Loss(2.0, "n00"),)), FREE)
    assert gone.curve[9] == 0 and math.isinf(gone.impacts[0].recovery_s)


def test_a_lost_engine_fails_its_requests_and_others_take_over():
    load = Workload(duration_s=6.0, streams=8, prompt_tokens=1, output_tokens=400, losses=(Loss(2.0, "e1", 2.0),))
    run = simulate(cluster(engines=2, engine_nodes=("e0", "e1")), load, FREE)
    assert 0 < run.num_failed <= 8 and run.curve[5] > 0


def test_open_arrivals_come_at_their_rate():
    load = Workload(duration_s=20.0, requests_per_s=10.0, prompt_tokens=1, output_tokens=2)
    assert simulate(cluster(), load, FREE).num_completed == pytest.approx(200, rel=0.3)


def test_statistics():
    assert percentile([3, 1, 2], 50) == 2 and percentile([3, 1, 2], 99) == 3 and math.isnan(percentile([], 50))
    impact = impact_of([10, 10, 10, 5, 0, 4, 10], 3.2, "n")
    assert (impact.before, impact.lowest, impact.recovery_s) == (10, 0, 3.0)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "must be a mapping"),
        ({}, "duration_s is missing"),
        ({"duration_s": 5}, "either streams or requests_per_s"),
        ({"duration_s": 5, "streams": 1, "requests_per_s": 1}, "either streams or requests_per_s"),
        ({"duration_s": 5, "stream": 1}, "there is no stream. The nearest is streams"),
        ({"duration_s": 5, "streams": 1.5}, "streams must be a whole number"),
        ({"duration_s": -5, "streams": 1}, "duration_s must be a number, 0 or more"),
        ({"duration_s": 5, "warm_up_s": 5, "streams": 1}, "warm_up_s: is 5"),
        ({"duration_s": 5, "streams": 1, "output_tokens": 0}, "must be 1 or more"),
        ({"duration_s": 5, "streams": 1, "losses": [{"at_s": 1}]}, r"losses\[0\]: node is missing"),
        ({"duration_s": 5, "streams": 1, "losses": 3}, "losses: must be a list"),
    ],
)
def test_a_wrong_load_is_explained(document, words):
    with pytest.raises(ConfigError, match=words):
        parse_workload(document)


def test_the_command_predicts_from_a_plan_file(tmp_path, capsys):
    inventory, plan, load = (tmp_path / name for name in ("inventory.yaml", "plan.json", "load.yaml"))
    host = {"memory_gb": 16, "bandwidth_gb_s": 18, "bf16_tflops": 0.1, "workers": 2}
    inventory.write_text(yaml.safe_dump({"nodes": [{"name": "here", "host": host}]}))
    assert main(["plan", "--model", "demo", "--inventory", str(inventory), "--json"]) == 0
    plan.write_text(capsys.readouterr().out)
    loss = {"at_s": 2, "node": "here", "back_after_s": 1}
    load.write_text(yaml.safe_dump({"duration_s": 5, "streams": 2, "output_tokens": 8, "losses": [loss]}))
    words = ["simulate", "--plan", str(plan), "--load", str(load)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "demo: 1 engines, 2 workers of 2 shards" in text and "loss of here at 2 s" in text and "###" in text
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["workers"] == 2 and len(result["curve"]) == 5 and result["constants"]["command"]
    load.write_text("duration_s: 5\nstreams: 1\nlosses: [{at_s: 1, node: there}]\n")
    assert main(words) == 2 and "no node there" in capsys.readouterr().err
    plan.write_text('{"fits": false}')
    assert main(words) == 2 and "not a plan that fits" in capsys.readouterr().err
