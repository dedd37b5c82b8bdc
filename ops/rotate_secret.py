"""``switchyard rotate-secret``."""

import argparse

from ops.actions import act, add_common

DESCRIPTION = """\
Change the secret that engines and workers prove to each other, while requests go on.

  switchyard rotate-secret

Workers accept the former and the next secret until every engine proves the next one; then the former is worthless.
Connections that are open stay open. A new secret is drawn at random; nobody needs to see it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    return act(arguments, "/api/rotate-secret", {}, "the former secret is worthless everywhere")
