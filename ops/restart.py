"""``switchyard restart``."""

import argparse

from ops.actions import act, add_common

DESCRIPTION = """\
Replace workers one after the other, while requests go on; each leaves when its successor is ready.

  switchyard restart                        all of them
  switchyard restart experts-0-1f3a9c02     this one

It needs memory for one worker more than there are.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workers", nargs="*", metavar="WORKER", help="ids of workers (default: all)")
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    return act(arguments, "/api/restart", {"workers": arguments.workers}, "restarted")
