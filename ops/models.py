"""``switchyard models``."""

import argparse
import json
from typing import Any

from deployments.models import WORKER_MEMORY_GB, find_model, known_models, report

DESCRIPTION = """\
List the known models, or one model or checkpoint folder, with its shape and the memory it takes by precision.

  switchyard models                    the catalog
  switchyard models grok-2             one of it
  switchyard models /models/mixtral    a folder, by its config.json
  switchyard models --json             everything, for programs

Sizes are counted from the models' configs. GB are 10^9 bytes. Precisions are those of the experts: bf16, int8 (a scale
for each output) and int4 (groups of 128); everything else and the KV cache are bf16. Active parameters include both
embedding tables. Workers are the fewest that hold all experts once, in nine tenths of 24, 80 or 141 GB each; * marks
more workers than a layer has experts: shards would have to divide layers, which `workers` does not do.
"""

_GB = 1e9
_HEAD = ("name", "params", "active", "layers", "experts", "bf16 GB", "int8 GB", "int4 GB", "dense GB", "KV KiB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="NAME|PATH", help="one model, or the folder of a checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    models = known_models() if arguments.model is None else (find_model(arguments.model),)
    reports = [report(model) for model in models]
    if arguments.json:
        print(json.dumps(reports if arguments.model is None else reports[0], indent=2))
    elif arguments.model is None:
        print(catalog_table(reports))
    else:
        print(model_page(reports[0]))
    return 0


def catalog_table(reports: list[dict[str, Any]]) -> str:
    """One line for each model; its experts' bytes and its workers by precision."""
    memories = "/".join(map(str, WORKER_MEMORY_GB))
    head = (*_HEAD, *(f"{precision} workers {memories}" for precision in ("bf16", "int8", "int4")))
    rows = [_row(facts) if "layers" in facts else (facts["name"], facts["note"]) for facts in reports]
    widths = [max(len(row[place]) for row in [head, *rows] if len(row) == len(head)) for place in range(len(head))]
    lines = []
    for row in [head, *rows]:
        first, *others = row
        name = first.ljust(widths[0])
        if len(row) == len(head):
            lines.append(
                "  ".join([name, *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))])
            )
        else:
            lines.append("  ".join([name, *others]))
    return "\n".join(lines)


def model_page(facts: dict[str, Any]) -> str:
    """Everything about one model, a fact a line."""
    if "layers" not in facts:
        return f"{facts['title']}: {facts['note']}"
    note = f" ({facts['note']})" if facts["note"] else ""
    lines = [
        f"{facts['title']}: {_billions(facts['total_params'])} parameters, "
        f"{_billions(facts['active_params'])} active for each token{note}",
        f"  config      {facts['source']}",
        f"  licence     {facts['licence']}",
        f"  shape       {facts['layers']} layers, {facts['moe_layers']} with {facts['experts']} experts of which "
        f"{facts['top_k']} run; hidden {facts['hidden_size']}, vocabulary {facts['vocab_size']}",
        f"  dense part  {_gb(facts['dense_bytes'])} GB in bf16, on every engine",
        f"  KV cache    {facts['kv_bytes_per_token'] / 1024:.1f} KiB a token in bf16",
        "  experts",
    ]
    for precision, size in facts["expert_bytes"].items():
        workers = ", ".join(f"{_workers(facts, precision, gb)} of {gb} GB" for gb in WORKER_MEMORY_GB)
        lines.append(
            f"    {precision}      {_gb(size['total'])} GB; {_gb(size['layer'])} a layer; "
            f"{size['expert'] / 1e6:.1f} MB each; workers: {workers}"
        )
    return "\n".join(lines)


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    sizes = facts["expert_bytes"]
    return (
        facts["name"],
        _billions(facts["total_params"]),
        _billions(facts["active_params"]),
        str(facts["layers"]),
        f"{facts['experts']} top {facts['top_k']}",
        *(_gb(size["total"]) for size in sizes.values()),
        _gb(facts["dense_bytes"]),
        f"{facts['kv_bytes_per_token'] / 1024:.0f}",
        *("/".join(_workers(facts, precision, gb) for gb in WORKER_MEMORY_GB) for precision in sizes),
    )


def _workers(facts: dict[str, Any], precision: str, gb: int) -> str:
    count = facts["expert_bytes"][precision]["workers"][str(gb)]
    return "none fits" if not count else f"{count}{'*' * (count > facts['experts'])}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count / 1e6:.1f}M"


def _gb(size: int) -> str:
    return f"{size / _GB:.1f}" if size >= _GB else f"{size / _GB:.3f}"
