"""``switchyard plan``."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from cluster.advice import Question, advise
from cluster.engine_options import Wishes, has_gpus
from cluster.errors import ConfigError
from cluster.inventory import Inventory, parse_inventory
from cluster.planner import Shortfall, make_plan
from deployments.models import find_model, longest_context, plan_facts
from ops.bench.constants import call_cost
from ops.plan_config import config_text
from ops.plan_report import plan_document, plan_lines, shortfall_document, shortfall_lines

DESCRIPTION = """\
Say whether a model fits on these machines, what runs where, and how fast it can be at best; and write the
ray-config.yaml that deploys exactly that. Without --inventory or --ray it plans for this machine.

  switchyard plan --model demo
  switchyard plan --model grok-1 --experts int8 --inventory machines.yaml --context 8192 --concurrency 16
  switchyard plan --model /models/grok-1-int8 --experts int8 --inventory machines.yaml --out ray-config.yaml
  switchyard plan --model mixtral-8x7b --ray auto --network 100,20 --json > plan.json

An inventory:

  nodes:
    - name: big                 # also the node's Ray label: ray start .. --labels switchyard-node=big
      gpus: {kind: a100-80gb, count: 8}     # or {count, memory_gb, bandwidth_gb_s, bf16_tflops}
      host: {memory_gb: 512, bandwidth_gb_s: 200, bf16_tflops: 4}
  network: {bandwidth_gbit_s: 100, latency_us: 20}       # between nodes

Exit status 1 when the model does not fit; then it prints the cheapest changes that make it fit.
--json prints {"fits", "model", "wishes", "inventory", "engines", "ranks", "layout", "devices", "speed", "assumptions",
"ray_config"}, or {"fits": false, "why", "missing_bytes", "advice": [{"change", "tokens_per_s", "itl_s"}]}.
"""

DEFAULT_CONTEXT = 8192
DOES_NOT_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model", required=True, metavar="NAME|PATH", help="a known model (`switchyard models`) or a checkpoint folder"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--inventory", type=Path, metavar="FILE", help="the machines, as YAML (default: this one)")
    source.add_argument("--ray", metavar="ADDRESS", help="the nodes of a running Ray cluster; auto finds one here")
    add("--network", metavar="GBIT_S,LATENCY_US", help="with --ray: the network between the nodes")
    add("--experts", choices=("bf16", "int8", "int4"), default="bf16", help="precision of the experts (%(default)s)")
    add("--context", type=int, metavar="N", help="tokens of prompt and answer (8192, or less where the model has less)")
    add("--concurrency", type=int, default=8, metavar="N", help="requests at the same time (%(default)s)")
    add("--engines", type=int, metavar="N", help="so many engines (default: as many as is fastest)")
    add("--host-experts", action="store_true", help="let experts live in host memory beside GPUs: fits more, slowly")
    add("--out", type=Path, metavar="FILE", help="write the ray-config.yaml here instead of printing it")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    question = _question(arguments)
    plan = make_plan(question.model, question.inventory, question.wishes, call_cost())
    if isinstance(plan, Shortfall):
        advice = advise(question, call_cost())
        if arguments.json:
            print(json.dumps(shortfall_document(plan, advice), indent=2))
        else:
            print("\n".join(shortfall_lines(plan, advice)))
        return DOES_NOT_FIT
    text = config_text(plan, arguments.model)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    if arguments.json:
        print(json.dumps(plan_document(plan, yaml.safe_load(text)), indent=2))
    else:
        print("\n".join(plan_lines(plan)))
        print(f"\nwritten: {arguments.out}" if arguments.out is not None else f"\n{text}", end="\n")
    return 0


def _question(arguments: argparse.Namespace) -> Question:
    for option in ("context", "concurrency", "engines"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option}: is {value}, must be 1 or more.")
    facts = plan_facts(find_model(arguments.model))
    context = arguments.context or min(DEFAULT_CONTEXT, longest_context(arguments.model) or DEFAULT_CONTEXT)
    wishes = Wishes(context, arguments.concurrency, arguments.host_experts, arguments.engines)
    inventory = _inventory(arguments)
    if arguments.host_experts and not has_gpus(inventory):
        print("switchyard plan: there are no GPUs, so all experts live in host memory anyway", file=sys.stderr)
    return Question(facts, arguments.experts, inventory, wishes)


def _inventory(arguments: argparse.Namespace) -> Inventory:
    if arguments.inventory is not None:
        return read_inventory(arguments.inventory)
    if arguments.ray is not None:
        from ops.ray_nodes import survey_cluster

        document: dict[str, Any] = {"nodes": survey_cluster(arguments.ray)}
        if arguments.network is not None:
            document["network"] = _network(arguments.network)
        elif len(document["nodes"]) > 1:
            raise ConfigError(f"--network: is needed, for Ray has {len(document['nodes'])} nodes. For example 100,20.")
        return parse_inventory(document)
    from deployments.machine import survey

    return parse_inventory({"nodes": [survey()]})


def read_inventory(path: Path) -> Inventory:
    """Raises ConfigError, naming the file, for anything that is not an inventory."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--inventory: cannot read {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    try:
        return parse_inventory(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _network(text: str) -> dict[str, float]:
    try:
        bandwidth, latency = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--network: must look like 100,20 (Gbit/s, microseconds), not {text!r}.") from None
    return {"bandwidth_gbit_s": bandwidth, "latency_us": latency}
