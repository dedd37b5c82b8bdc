"""`switchyard bench fit`: the constants of plans and simulations from what `switchyard bench workers` has measured, and
how far simulations with them are from the measurements.

Fitted are the runs with one worker: the rates that their kernels reach to all of them, the rest to those at the fewest
and at the most streams. All streams of a run begin at once, so its steps are those of their prompts, and then as many
as an answer has further tokens, with one token of every stream.
"""

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError
from cluster.inventory import Chip
from cluster.placement import partition
from cluster.roofline import dense_seconds, expert_seconds
from cluster.simulation import SimCluster, SimShard, simulate
from cluster.workload import Workload
from ops.bench.constants import costs_of
from ops.plan_file import read_plan

Run = Mapping[str, Any]

_SIMULATED_S = 60.0
_WARM_UP_S = 5.0
_TRIED = tuple(percent / 100 for percent in range(2, 121))
_FRONT = ("gather_us", "send_us", "combine_us")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard bench fit`."""
    add = parser.add_argument
    add("--runs", type=Path, required=True, metavar="FILE", help="what `switchyard bench workers` has printed")
    add("--plan", type=Path, required=True, metavar="FILE", help="`switchyard plan --json` of that model and machine")
    add("--prompt-tokens", type=int, default=32, metavar="N", help="as measured (%(default)s)")
    add("--output-tokens", type=int, default=32, metavar="N", help="as measured (%(default)s)")
    add("--notice", type=float, default=2.5, metavar="S", help="from a node's loss to calls elsewhere (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the constants as YAML, and below them, as comments, prediction against measurement."""
    runs = read_runs(args.runs)
    cluster = read_plan(args.plan)
    load = Workload(_SIMULATED_S, _WARM_UP_S, 1, prompt_tokens=args.prompt_tokens, output_tokens=args.output_tokens)
    values = {**fit(runs, cluster, load), "notice_s": args.notice}
    print(yaml.safe_dump(values, sort_keys=False), end="")
    print("\n".join(comparison(runs, cluster, values, load)))
    return 0


def read_runs(path: Path) -> list[Run]:
    """Lines of JSON. Raises ConfigError when there is not enough to fit."""
    try:
        runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--runs: cannot read {path}: {error}") from None
    if len({each["streams"] for each in runs if each["workers"] == 1 and each["layer_call"]}) < 2:
        raise ConfigError(f"{path}: has no runs with one worker and at least two numbers of streams.")
    return runs


def fit(runs: Sequence[Run], cluster: SimCluster, load: Workload) -> dict[str, float]:
    """The constants of constants.yaml, but for notice_s, in its units."""
    alone = sorted((each for each in runs if each["workers"] == 1), key=lambda each: each["streams"])
    first, last = alone[0], alone[-1]
    low, high = first["layer_call"]["tokens_per_call"], last["layer_call"]["tokens_per_call"]
    call_us, call_token_us = _line(low, _beside_us(first), high, _beside_us(last))
    efficiencies = _efficiencies(alone, cluster, load)
    engine = dataclasses.replace(cluster.engine, chip=cluster.engine.chip.reaching(*efficiencies))
    reached = dataclasses.replace(cluster, engine=engine)
    steps = [_step_us(each, reached, call_us + call_token_us * each["streams"]) for each in (first, last)]
    step_us, step_request_us = _line(first["streams"], steps[0], last["streams"], steps[1])
    return {
        "call_us": round(call_us, 1),
        "call_token_us": round(call_token_us, 2),
        "step_us": round(step_us, 1),
        "step_request_us": round(step_request_us, 1),
        "message_us": round(_message_us(runs, first), 1),
        "read_efficiency": round(efficiencies[0], 3),
        "arithmetic_efficiency": round(efficiencies[1], 3),
    }


def comparison(runs: Sequence[Run], cluster: SimCluster, values: Mapping[str, float], load: Workload) -> Iterator[str]:
    """A line for each run: measured, predicted, and how far off."""
    head = f"# {'workers':>7} {'streams':>7} {'tokens/s':>9} {'predicted':>9} {'error':>6}"
    yield f"{head} {'itl ms':>8} {'predicted':>9} {'error':>6}"
    for each in runs:
        streams = each["streams"]
        outcome = simulate(
            divided(cluster, each["workers"]), dataclasses.replace(load, streams=streams), costs_of(values)
        )
        itl_ms = outcome.itl_mean_s * 1e3
        yield (
            f"# {each['workers']:>7} {streams:>7} {each['throughput']:>9.1f} {outcome.tokens_per_s:>9.1f} "
            f"{outcome.tokens_per_s / each['throughput'] - 1:>+6.0%} {each['itl_ms']:>8.2f} {itl_ms:>9.2f} "
            f"{itl_ms / each['itl_ms'] - 1:>+6.0%}"
        )


def divided(cluster: SimCluster, num_workers: int) -> SimCluster:
    """The same machine with its experts and rates divided among so many workers."""
    model, node = cluster.model, cluster.engine_nodes[0]
    whole = cluster.engine.chip
    chip = Chip(whole.memory_bytes, whole.bandwidth_bytes_s / num_workers, whole.flops / num_workers)
    shards = tuple(
        SimShard(0, model.num_moe_layers, shard.experts[0], shard.experts[-1] + 1, ((node, chip),))
        for shard in partition(model.num_moe_layers, model.num_experts, num_workers)
    )
    return dataclasses.replace(cluster, shards=shards, max_num_seqs=64)


def _line(x: float, y: float, other_x: float, other_y: float) -> tuple[float, float]:
    """Intercept and slope; neither is below 0, which a measurement may pretend."""
    slope = max(0.0, (other_y - y) / (other_x - x))
    return max(0.0, y - slope * x), slope


def _beside_us(run: Run) -> float:
    """Of a layer call with one worker: everything but the kernel."""
    call = run["layer_call"]
    return float(sum(call[key] for key in _FRONT) + call["wait_us"] - call["compute_us"])


def _efficiencies(runs: Sequence[Run], cluster: SimCluster, load: Workload) -> tuple[float, float]:
    """What kernels reach of the bandwidth and of the arithmetic rate: the pair that is nearest to all runs."""

    def error(pair: tuple[float, float]) -> float:
        chip = cluster.engine.chip.reaching(*pair)
        return sum(
            math.log(_compute_us(each["streams"], cluster, chip, load) / each["layer_call"]["compute_us"]) ** 2
            for each in runs
        )

    return min(itertools.product(_TRIED, _TRIED), key=error)


def _kernel_us(tokens: float, cluster: SimCluster, chip: Chip) -> float:
    return expert_seconds(cluster.model, chip, cluster.model.num_experts, tokens) * 1e6


def _compute_us(streams: int, cluster: SimCluster, chip: Chip, load: Workload) -> float:
    """Mean of the layer calls of a run with so many streams."""
    prompts = streams * load.prompt_tokens
    num_prompt_steps = math.ceil(prompts / cluster.max_num_batched_tokens)
    num_steps = num_prompt_steps + load.output_tokens - 1
    prompt_us = num_prompt_steps * _kernel_us(prompts / num_prompt_steps, cluster, chip)
    return (prompt_us + (load.output_tokens - 1) * _kernel_us(streams, cluster, chip)) / num_steps


def _step_us(run: Run, cluster: SimCluster, beside_us: float) -> float:
    """Time between tokens without layer calls and without the engine's own kernels."""
    call_us = beside_us + _kernel_us(run["streams"], cluster, cluster.engine.chip)
    dense_us = dense_seconds(cluster.model, cluster.engine, run["streams"], 0) * 1e6
    return float(run["itl_ms"]) * 1e3 - cluster.model.num_moe_layers * call_us - dense_us


def _message_us(runs: Sequence[Run], first: Run) -> float:
    """What the dispatcher's own work grows by with each further worker, at the fewest streams."""
    most = max((each for each in runs if each["streams"] == first["streams"]), key=lambda each: each["workers"])
    if most["workers"] == 1:
        return 0.0
    grown = sum(most["layer_call"][key] - first["layer_call"][key] for key in _FRONT)
    return max(0.0, float(grown) / float(most["workers"] - 1))
