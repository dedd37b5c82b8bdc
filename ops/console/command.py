"""``switchyard console``."""

import argparse

from ops.api_client import add_cluster_arguments, connect

DESCRIPTION = """\
Print a link that opens the web console of a running cluster. It signs in one browser, once, within ten minutes; the
browser stays signed in for twelve hours.

  switchyard console
  xdg-open "$(switchyard console)"
  ssh -L 8100:127.0.0.1:8100 HOST     then the link of `switchyard serve --ops-port 8100` opens here too
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    print(connect(arguments).post("/api/links", {})["url"])
    return 0
