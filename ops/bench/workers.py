"""`switchyard bench workers`: Switchyard alone, with one, two and four expert workers, one after the other.

What `switchyard simulate` is fed with and checked against: figures over HTTP and, in each layer call, the time of the
kernels and of everything else.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.config import to_args
from cluster.errors import SwitchyardError
from ops.bench import report
from ops.bench.compare import Comparison, environments_of, make_plan, say, settings_of
from ops.bench.servers import num_cores
from ops.bench.sides import vocabulary_size

DEFAULTS = {"rounds": 1, "quick": True, "sequential": True, "colocated_env": [], "switchyard_env": []}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard bench workers`."""
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder of the checkpoint")
    add("--counts", type=_counts, default=(1, 2, 4), metavar="N,N,..", help="expert workers (1,2,4)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="bfloat16", help="precision (%(default)s)")
    add("--streams", type=_counts, default=(1, 4, 16), metavar="N,N,..", help="levels (1,4,16)")
    add("--requests-per-stream", type=int, default=2, metavar="N", help="in every level (%(default)s)")
    add("--prompt-tokens", type=int, default=32, metavar="N", help="length of a prompt (%(default)s)")
    add("--output-tokens", type=int, default=32, metavar="N", help="length of an answer (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the prompts (%(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting: engine.enforce_eager=true")
    add("--logs", type=Path, metavar="DIR", help="keep the servers' logs here (default: a temporary folder)")
    add("--start-timeout", type=float, default=900.0, metavar="S", help="seconds until ready (%(default)s)")
    parser.set_defaults(**DEFAULTS)


def _counts(text: str) -> tuple[int, ...]:
    numbers = tuple(sorted({int(word) for word in text.split(",")}))
    if not numbers or numbers[0] < 1:
        raise ValueError
    return numbers


def run(args: argparse.Namespace) -> int:
    """Prints a line of JSON for every level: {"cores", "workers", "streams", figures.., "layer_call": {..}}."""
    try:
        for count in args.counts:
            for measured in _measured(args, count):
                print(json.dumps(measured), flush=True)
    except SwitchyardError as error:
        say(f"switchyard bench: {error}")
        return 1
    return 0


def _measured(args: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """Every level with so many workers."""
    args.workers = count
    plan = make_plan(args, vocabulary_size(Path(args.model).expanduser()))
    settings = settings_of(args, plan)
    logs = (args.logs or Path(tempfile.mkdtemp(prefix="switchyard-bench-"))) / f"workers-{count}"
    logs.mkdir(parents=True, exist_ok=True)
    say(f"{count} worker{'s' * (count > 1)}: {to_args(settings)['model']}")
    comparison = Comparison(plan, settings, environments_of(args, settings), logs)
    figures = comparison.run_switchyard()
    calls: Mapping[int, list[dict[str, float] | None]] = comparison.layer_calls
    return [
        {
            "cores": num_cores(),
            "workers": count,
            "streams": streams,
            **asdict(each),
            "layer_call": report.mean_layer_call(calls[streams]),
        }
        for streams, each in figures.items()
    ]
