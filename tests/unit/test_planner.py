"""Plans: what holds of every plan, what was worked out by hand, and the worked examples of tests/plans."""

import dataclasses
import random
from collections import Counter

import pytest
import yaml

from cluster.advice import Question, advise
from cluster.config import parse_settings
from cluster.engine_options import USABLE_SHARE, Wishes, has_gpus
from cluster.inventory import GB, Chip, Inventory, Node, parse_inventory
from cluster.layout import shards_of
from cluster.packing import Slot, pack, pack_evenly
from cluster.planner import ClusterPlan, Shortfall, make_plan
from cluster.roofline import CallCost, ModelFacts, distinct_experts, visiting_share
from deployments.models import find_model, plan_facts
from model.sizes import USABLE_SHARE as SHARE_OF_SIZES
from ops.cli import main
from tests.worked_plans import CASES, FOLDER, said

CALL = CallCost(6e-4, 5e-6)
SEEDS = range(40)


def random_model(rng: random.Random) -> ModelFacts:
    num_experts = rng.choice([2, 4, 8, 16, 60, 128])
    params = rng.randrange(10**5, 10**9)
    heads = rng.choice([6, 16, 48])
    return ModelFacts(
        name="m",
        precision="bf16",
        num_moe_layers=rng.randrange(1, 70),
        num_experts=num_experts,
        top_k=rng.randrange(1, num_experts),
        hidden_size=rng.choice([256, 4096]),
        num_heads=heads,
        kv_parts=rng.choice([1, 2, heads]),
        expert_bytes=2 * params,
        expert_params=params,
        dense_bytes=rng.randrange(10**8, 3 * 10**10),
        dense_params=10**9,
        kv_bytes_per_token=rng.choice([1000, 300_000]),
    )


def random_inventory(rng: random.Random) -> Inventory:
    nodes = []
    for number in range(rng.randrange(1, 5)):
        chip = Chip(rng.choice([16, 24, 80, 141]) * GB, rng.choice([600, 3350]) * GB, 1e14)
        host = Chip(rng.choice([64, 512, 2000]) * GB, 100 * GB, 1e12)
        has_gpu = rng.random() < 0.7
        nodes.append(Node(f"n{number}", rng.randrange(1, 9) if has_gpu else 0, chip if has_gpu else None, 1, host))
    return Inventory(tuple(nodes), 12.5 * GB, 1e-5)


def random_question(seed: int) -> tuple[ModelFacts, Inventory, Wishes]:
    rng = random.Random(seed)
    wishes = Wishes(rng.choice([512, 8192]), rng.choice([1, 8, 40]), host_experts=rng.random() < 0.5)
    return random_model(rng), random_inventory(rng), wishes


@pytest.mark.parametrize("seed", SEEDS)
def test_every_plan_holds_every_expert_once_within_every_memory(seed):
    model, inventory, wishes = random_question(seed)
    plan = make_plan(model, inventory, wishes, CALL)
    assert plan == make_plan(model, inventory, wishes, CALL)
    if isinstance(plan, Shortfall):
        assert plan.missing_bytes >= 0 and plan.text
        return
    check_shards(plan)
    check_memory(plan)
    check_cards(plan)
    assert plan.speed.tokens_per_s > 0 and plan.speed.bottleneck
    requests = -(-wishes.concurrency // plan.engines)
    assert plan.kv_tokens >= requests * wishes.context_tokens


def check_shards(plan: ClusterPlan) -> None:
    """The layout is one that the settings accept: every expert of every layer once, replicas spread evenly."""
    args = {"model": "m", "engines": plan.engines, "layout": dataclasses.asdict(plan.layout)}
    shards_of(parse_settings(args), plan.model.num_moe_layers, plan.model.num_experts)
    with_workers = {u.node for u in plan.devices if u.device.startswith("gpu") and not u.holds.startswith("engine")}
    for shard in plan.layout.shards:
        assert shard.replicas % len(shard.nodes) == 0
        if shard.device == "gpu" and len(with_workers) > 1:
            assert shard.replicas == len(shard.nodes)


def check_memory(plan: ClusterPlan) -> None:
    for use in plan.devices:
        assert 0 <= use.kv_bytes <= use.used_bytes <= use.capacity_bytes, use
    for node in plan.inventory.nodes:
        on_host = sum(u.used_bytes for u in plan.devices if u.node == node.name and not u.device.startswith("gpu"))
        assert on_host <= node.host.memory_bytes * node.num_host_workers * USABLE_SHARE


def check_cards(plan: ClusterPlan) -> None:
    """Engines and workers have whole cards of their own, and no node gives more than it has."""
    for node in plan.inventory.nodes:
        cards = [use.device for use in plan.devices if use.node == node.name and use.device.startswith("gpu")]
        assert len(set(cards)) == len(cards) == (node.num_gpus if plan.on_gpu else 0)
        pinned = sum(
            s.replicas // len(s.nodes) for s in plan.layout.shards if node.name in s.nodes and s.device == "gpu"
        )
        engines = plan.engines // len(plan.layout.engine_nodes) * (node.name in plan.layout.engine_nodes)
        assert pinned + (engines * plan.ranks if plan.on_gpu else 0) <= max(node.num_gpus, 0)


def test_some_random_questions_have_plans_and_some_have_none():
    fits = [isinstance(make_plan(*random_question(seed), CALL), ClusterPlan) for seed in range(12)]
    assert 2 < sum(fits) < len(fits) - 1


@pytest.mark.parametrize("seed", range(40))
def test_packing_is_exact_and_within_every_capacity(seed):
    rng = random.Random(seed)
    layers, experts = rng.randrange(1, 20), rng.randrange(1, 12)
    sizes = sorted((rng.randrange(1, 60) for _ in range(rng.randrange(1, 12))), reverse=True)
    slots = [Slot(size, rng.choice([1.0, 4.0])) for size in sizes]
    for blocks in (pack(slots, layers, experts), pack_evenly(slots, layers, experts)):
        if blocks is None:
            assert sum(sizes) < 3 * layers * experts  # division into rectangles wastes less than that
            continue
        held = Counter(
            (layer, expert)
            for block in blocks
            for layer in range(block.first_layer, block.end_layer)
            for expert in range(block.first_expert, block.end_expert)
        )
        assert set(held) == {(n, e) for n in range(layers) for e in range(experts)} and set(held.values()) == {1}
        assert len({block.slot for block in blocks}) == len(blocks)
        assert all(block.units <= slots[block.slot].capacity for block in blocks)


def test_a_single_device_takes_everything_and_more_share_it_evenly():
    slots = [Slot(64, 1.0)] * 4
    (block,) = pack(slots, 8, 8)
    assert block.units == 64
    assert [block.units for block in pack_evenly(slots, 8, 8)] == [16] * 4


def test_mixed_speeds_share_by_speed():
    fast, slow = pack_evenly([Slot(100, 3.0), Slot(100, 1.0)], 4, 8)
    assert (fast.units, slow.units) == (24, 8)


def test_expected_counts():
    assert distinct_experts(8, 8, 2, 1) == pytest.approx(2)
    assert distinct_experts(4, 8, 2, 10_000) == pytest.approx(4)
    assert visiting_share(8, 8, 2) == 1.0 and visiting_share(7, 8, 2) == 1.0
    assert visiting_share(1, 8, 2) == pytest.approx(2 / 8)


def test_replicas_of_a_shard_stand_on_different_nodes():
    model = dataclasses.replace(random_model(random.Random(1)), dense_bytes=GB, expert_bytes=10**7)
    chip = Chip(80 * GB, 3350 * GB, 1e15)
    inventory = Inventory(tuple(Node(f"n{n}", 4, chip, 0, None) for n in range(3)), 12.5 * GB, 1e-5)
    plan = make_plan(model, inventory, Wishes(512, 8, engines=1), CALL)
    assert isinstance(plan, ClusterPlan) and plan.engines == 1
    assert any(shard.replicas > 1 for shard in plan.layout.shards)
    assert all(len(shard.nodes) == shard.replicas for shard in plan.layout.shards)


def test_without_gpus_everything_is_in_host_memory():
    host = {"memory_gb": 24, "bandwidth_gb_s": 20, "bf16_tflops": 0.1, "workers": 2}
    inventory = parse_inventory({"nodes": [{"name": "here", "host": host}]})
    plan = make_plan(plan_facts(find_model("demo"))["bf16"], inventory, Wishes(1024, 8), CALL)
    assert isinstance(plan, ClusterPlan) and not has_gpus(inventory) and not plan.on_gpu and plan.ranks == 1
    assert {shard.device for shard in plan.layout.shards} == {"cpu"}
    assert all(shard.shadow is None for shard in plan.layout.shards)


@pytest.mark.parametrize("seed", range(12))
def test_advice_leads_to_plans(seed):
    model, inventory, wishes = random_question(seed)
    half = dataclasses.replace(model, precision="int8", expert_bytes=model.expert_bytes // 2)
    question = Question({"bf16": model, "int8": half}, "bf16", inventory, wishes)
    if isinstance(make_plan(model, inventory, wishes, CALL), Shortfall):
        for advice in advise(question, CALL):
            assert advice.text and advice.plan.speed.tokens_per_s > 0


def test_the_share_of_memory_is_the_one_that_sizes_are_listed_with():
    assert USABLE_SHARE == SHARE_OF_SIZES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.path.stem)
def test_worked_plans(case):
    """After a change that is meant to change them: python -m tests.worked_plans."""
    status, text = said(case)
    assert (status == 0) == case.fits
    assert text == case.path.read_text()
    if case.fits:
        document = yaml.safe_load(text[text.index("# Written by") :])
        settings = parse_settings(document["applications"][0]["args"])
        shards_of(settings, 64, 8)


def test_no_worked_plan_is_left_over():
    assert {case.path for case in CASES} == set(FOLDER.glob("*.txt"))
    assert {FOLDER / f"{case.inventory}.yaml" for case in CASES} == set(FOLDER.glob("*.yaml"))


def test_mistakes_in_the_command_are_explained(tmp_path, capsys):
    bad = tmp_path / "inventory.yaml"
    bad.write_text("nodes: [{name: a, gpus: {kind: h100, count: 1}}]\n")
    for words, message in (
        (["--inventory", bad], "'h100' is not known"),
        (["--inventory", tmp_path / "none"], "cannot read"),
        (["--inventory", bad, "--concurrency", "0"], "--concurrency: is 0"),
        (["--ray", "auto", "--inventory", bad], None),
    ):
        command = ["plan", "--model", "grok-1", *map(str, words)]
        if message is None:
            with pytest.raises(SystemExit):
                main(command)
            continue
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert main(["plan", "--model", "grok-3"]) == 2 and "not yet released" in capsys.readouterr().err
