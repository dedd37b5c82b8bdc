"""``switchyard simulate``."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.simulated import Outcome
from cluster.simulation import SimCluster, simulate
from cluster.workload import parse_workload
from ops.bench.constants import constants, costs_of
from ops.plan_file import read_plan, read_yaml

DESCRIPTION = """\
Predict how a planned cluster behaves under a load: throughput, latency, and what losing nodes does to both.

  switchyard plan --model grok-1 --experts int8 --inventory machines.yaml --json > plan.json
  switchyard simulate --plan plan.json --load load.yaml
  switchyard simulate --plan plan.json --load load.yaml --json | jq .tokens_per_s

A load:

  duration_s: 30              # simulated
  warm_up_s: 5                # of it, not counted
  streams: 64                 # requests at the same time, each followed by the next; or requests_per_s: 20
  prompt_tokens: 128
  output_tokens: 64
  expert_skew: 0.5            # 0: experts are chosen evenly; s: the n-th most wanted as often as 1 / n^s says
  losses: [{at_s: 10, node: box-3, back_after_s: 10}]

Kernels take roofline time divided by the efficiency that was measured; everything else is what the benchmark measured
(ops/bench/constants.yaml, which names the command and the machine). How far off this is stands in ops/bench/README.md.

--json prints {"tokens_per_s", "ttft_p50_s", "ttft_p99_s", "itl_mean_s", "itl_p99_s", "num_completed", "num_failed",
"busiest_worker", "mean_worker", "busy": [[share of each worker] of each shard], "curve": [tokens of each second],
"impacts": [{"at_s", "node", "before", "lowest", "recovery_s"}], "workers", "engines", "constants"}; recovery_s is null
when throughput did not recover.
"""

_BAR = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--plan", type=Path, required=True, metavar="FILE", help="what `switchyard plan --json` has printed")
    add("--load", type=Path, required=True, metavar="FILE", help="the load, as YAML")
    add("--constants", type=Path, metavar="FILE", help="constants of your own (`switchyard bench fit`)")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    cluster = read_plan(arguments.plan)
    try:
        load = parse_workload(read_yaml(arguments.load, "--load"))
    except ConfigError as error:
        raise ConfigError(f"{arguments.load}: {error}") from None
    nodes = {*cluster.engine_nodes, *(node for shard in cluster.shards for node, _ in shard.workers)}
    for loss in load.losses:
        if loss.node not in nodes:
            raise ConfigError(f"{arguments.load}: losses: the plan uses no node {loss.node}, but {_some(nodes)}.")
    values = constants() if arguments.constants is None else read_yaml(arguments.constants, "--constants")
    try:
        costs = costs_of(values)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{arguments.constants}: {error} is missing; `switchyard bench fit` prints all.") from None
    outcome = simulate(cluster, load, costs, _progress(load.duration_s))
    if arguments.json:
        print(json.dumps(_document(cluster, outcome, values), indent=2))
    else:
        print("\n".join(_lines(cluster, outcome)))
    return 0


def _progress(duration_s: float) -> Callable[[float], None]:
    """On a terminal: a line that is written over."""

    def say(now_s: float) -> None:
        if sys.stderr.isatty():
            print(f"\r{now_s:7.1f} of {duration_s:.0f} s simulated", end="", file=sys.stderr, flush=True)

    return say


def _document(cluster: SimCluster, outcome: Outcome, values: Mapping[str, Any]) -> dict[str, Any]:
    document = _without_infinity(dataclasses.asdict(outcome))
    workers = sum(len(shard.workers) for shard in cluster.shards)
    return {**document, "engines": cluster.engine.count, "workers": workers, "constants": dict(values)}


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(cluster: SimCluster, outcome: Outcome) -> Iterator[str]:
    workers = sum(len(shard.workers) for shard in cluster.shards)
    yield f"{cluster.model.name}: {cluster.engine.count} engines, {workers} workers of {len(cluster.shards)} shards"
    yield f"  throughput            {outcome.tokens_per_s:10.1f} tokens/s"
    yield f"  time to first token   {outcome.ttft_p50_s * 1e3:10.1f} ms, p99 {outcome.ttft_p99_s * 1e3:.1f} ms"
    yield f"  between tokens        {outcome.itl_mean_s * 1e3:10.1f} ms, p99 {outcome.itl_p99_s * 1e3:.1f} ms"
    yield f"  requests              {outcome.num_completed:10d} completed, {outcome.num_failed} failed"
    busy = f"{outcome.mean_worker:10.0%} busy on average, the busiest {outcome.busiest_worker:.0%}"
    yield f"  workers               {busy}"
    for impact in outcome.impacts:
        after = f"after {impact.recovery_s:.0f} s" if math.isfinite(impact.recovery_s) else "not within this run"
        yield (
            f"  loss of {impact.node} at {impact.at_s:g} s: {impact.before:.0f} tokens/s fall to {impact.lowest}; "
            f"recovered {after}"
        )
    yield ""
    yield "tokens in each second"
    most = max(1, *outcome.curve)
    for second, tokens in enumerate(outcome.curve):
        yield f"{second:>5} s {'#' * round(_BAR * tokens / most):<{_BAR}} {tokens}"


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (", .." if len(listed) > 5 else "")
