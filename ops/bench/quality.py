"""`switchyard bench quality`: what int8 and int4 experts cost the demo model, on text that it was not trained on."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from deployments.quality import Quality


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard bench quality`."""
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="read about so many tokens (default: all held-out text)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache/switchyard-demo",
        metavar="DIR",
        help="where the text's Debian packages are kept (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Exit status of `switchyard bench quality`."""
    from deployments.models import DEMO_MODEL, resolve_model
    from deployments.quality import CorpusError, measure

    if args.max_tokens is not None and args.max_tokens < 1:
        raise ConfigError(f"--max-tokens: is {args.max_tokens}, must be 1 or more.")
    try:
        found = measure(resolve_model(DEMO_MODEL), args.cache, args.max_tokens, _say)
    except CorpusError as error:
        print(f"switchyard bench: {error}", file=sys.stderr)
        return 1
    print(json.dumps([dataclasses.asdict(row) for row in found], indent=2) if args.json else table(found))
    return 0


def table(found: "list[Quality]") -> str:
    """As Markdown."""
    least = found[0].perplexity
    rows = [
        f"| {row.precision} | {row.perplexity:.3f} | {row.perplexity / least - 1:+.2%} | {row.agreement:.2%} |"
        for row in found
    ]
    head = ["| experts | perplexity | against bf16 | same likeliest token |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *rows, "", f"{found[0].num_tokens} held-out tokens"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
