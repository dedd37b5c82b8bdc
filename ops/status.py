"""``switchyard status``."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from cluster.layout import differences
from ops.api_client import add_cluster_arguments, connect
from ops.events import event_line

DESCRIPTION = """\
Show a running cluster: shards with their replicas, spares, engines, and what happened last. Where the configuration
has a layout, it says what runs elsewhere than planned.

  switchyard status
  switchyard status --json | jq '.shards[].replicas[].state'

--json prints {"model", "epoch", "router": {"pid", "node"}, "missing_shards": [..],
  "shards": [{"id", "layers": [first, end], "experts": [..], "num_experts", "wanted",
              "replicas": [{"id", "pid", "node", "state", "role", "load": {..}, "memory_bytes", "device", "age_s",
                            "node_name"}], "most": replicas that the layout has room for, or null}],
  "layout": the layout of the configuration, or null,
  "spares": [{"id", "pid", "node", "state", "shard"}],
  "engines": [{"id", "pid", "node", "state", "load", "age_s", "node_name"}],
  "events": [{"time_s", "kind", "subject", "text"}], "progress": {source: text}}
Exit status 1 when a shard has no worker or no engine is ready.
"""

_LAST_EVENTS = 5
_RED, _GREEN, _YELLOW, PLAIN = "\033[31m", "\033[32m", "\033[33m", "\033[0m"
COLOURS = {"online": _GREEN, "ready": _GREEN, "serving": _YELLOW, "draining": _YELLOW, "gone": _RED, "stalled": _RED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_cluster_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    status = connect(arguments).get("/api/status")
    if arguments.json:
        print(json.dumps(status))
    else:
        print("\n".join(render(status, sys.stdout.isatty())))
    is_serving = not status["missing_shards"] and any(e["state"] == "ready" for e in status["engines"])
    return 0 if is_serving else 1


def render(status: dict[str, Any], colours: bool = False) -> list[str]:
    """The lines that people read."""

    def paint(state: str, width: int) -> str:
        text = f"{state:<{width}}"
        return f"{COLOURS[state]}{text}{PLAIN}" if colours and state in COLOURS else text

    lines = [f"{status['model']}, epoch {status['epoch']}"]
    for shard in status["missing_shards"]:
        lines.append(f"shard {shard} HAS NO WORKER: calls wait for one")
    lines += [
        "",
        f"{'shard':<22}{'replica':<22}{'state':<10}{'role':<9}{'pid':>7}  {'tokens/s':>8}  {'memory':>9}  {'age':>7}  "
        "on",
    ]
    for shard in status["shards"]:
        lines += _shard_lines(shard, paint)
    for spare in status["spares"]:
        where = f"shard {spare['shard']}" if spare["shard"] is not None else ""
        lines.append(f"{'':<22}{spare['id']:<22}{paint(spare['state'], 10)}{'spare':<9}{spare['pid']:>7}  {where}")
    lines += ["", f"{'engine':<22}{'state':<10}{'pid':>7}  {'age':>7}"]
    for engine in status["engines"]:
        lines.append(f"{engine['id']:<22}{paint(engine['state'], 10)}{engine['pid']:>7}  {age(engine['age_s']):>7}")
    if not status["engines"]:
        lines.append("none")
    if status["layout"] is not None:
        found = differences(status["layout"], status)
        lines += ["", "as planned" if not found else "not as planned:", *(f"  {line}" for line in found)]
    return [*lines, "", *map(event_line, status["events"][-_LAST_EVENTS:])]


def _shard_lines(shard: dict[str, Any], paint: Any) -> Iterator[str]:
    first, end = shard["layers"]
    online = sum(r["state"] == "online" and r["role"] == "primary" for r in shard["replicas"])
    head = f"{shard['id']}: {shard['num_experts']} x [{first}, {end})"
    note = f" ({online} of {shard['wanted']})" if online != shard["wanted"] else ""
    for replica in shard["replicas"] or [None]:
        if replica is None:
            yield f"{head + note:<22}none"
            return
        rate = replica["load"].get("tokens_per_s")
        yield (
            f"{head + note:<22}{replica['id']:<22}{paint(replica['state'], 10)}{replica['role']:<9}{replica['pid']:>7}"
            f"  {'' if rate is None else format(rate, '.1f'):>8}  {replica['memory_bytes'] / 2**20:>5.0f} MiB  "
            f"{age(replica['age_s']):>7}  {' '.join(filter(None, (replica['node_name'], replica['device'])))}"
        )
        head = note = ""


def age(seconds: float) -> str:
    """For example "65 s", "12 min", "5 h"."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.0f} h"
