"""``switchyard scale``."""

import argparse

from ops.actions import act, add_common

DESCRIPTION = """\
Change how many replicas a shard has, while requests go on. New ones take calls as soon as they are ready.

  switchyard scale 0 --replicas 3
  switchyard scale 0 --replicas 1      those too many finish what they have taken, and leave

`switchyard status` lists the shards.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shard", type=int, help="number of the shard")
    parser.add_argument("--replicas", type=int, required=True, metavar="N", help="copies it shall have, at least 1")
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    body = {"shard": arguments.shard, "replicas": arguments.replicas}
    return act(arguments, "/api/scale", body, f"shard {arguments.shard} has {arguments.replicas} replicas")
