"""``switchyard drain``, ``scale`` and ``restart``: what is done, while it is being done."""

import argparse
import sys
import time
from collections.abc import Callable

from cluster.errors import SwitchyardError
from ops.api_client import add_cluster_arguments, connect

FAILED = 1


def add_common(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)


def act(arguments: argparse.Namespace, path: str, body: dict[str, object], done: str) -> int:
    """Do it and say how it goes. 0: done, 1: the cluster could not; a ConfigError is the caller's mistake."""
    say = _speaker()
    try:
        connect(arguments).act(path, body, say)
    except SwitchyardError as error:
        if error.fault == "client":
            raise
        print(f"switchyard: {error}", file=sys.stderr)
        return FAILED
    say(done)
    return 0


def _speaker() -> Callable[[str], None]:
    begin_s = time.monotonic()
    return lambda text: print(f"[{time.monotonic() - begin_s:4.0f} s] {text}", flush=True)
