"""``switchyard drain``."""

import argparse

from ops.actions import act, add_common

DESCRIPTION = """\
Take a worker out: it finishes what it has taken, takes nothing new, and leaves. No request fails or waits.

  switchyard drain experts-0-1f3a9c02              its shard has one replica less afterwards
  switchyard drain experts-0-1f3a9c02 --replace    another one is ready before it leaves

`switchyard status` lists the workers.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("worker", help="id of the worker")
    parser.add_argument(
        "--replace", action="store_true", help="start another first, so that the shard keeps its replicas"
    )
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    body = {"worker": arguments.worker, "replace": arguments.replace}
    return act(arguments, "/api/drain", body, f"drained {arguments.worker}")
