"""``switchyard down``: stop what `switchyard up`, `serve` or `join` started on this machine."""

import argparse
import signal
import time

import psutil

from cluster.errors import ConfigError
from ops.runs import find_run, joined_nodes, living_runs

DESCRIPTION = """\
Stop the cluster that this machine is the head of, or take this machine out of the cluster that it has joined. Waits
until every process has ended.

  switchyard down
  switchyard down --port 8000      the cluster whose HTTP API has that port, where several run
"""

FAILED = 1
_LIMIT_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, help="port of the cluster's HTTP API")


def run(arguments: argparse.Namespace) -> int:
    """0: stopped; 1: it does not end."""
    joined = joined_nodes()
    if not living_runs() and joined and arguments.port is None:
        return max(_stop(each.pid, f"this machine's part in {each.head}") for each in joined)
    try:
        chosen = find_run(arguments.port)
    except ConfigError as error:
        raise ConfigError(f"{error} There is nothing to stop.") from None
    return _stop(chosen.pid, f"{chosen.http} ({chosen.model})")


def _stop(pid: int, name: str) -> int:
    print(f"stopping {name}", flush=True)
    try:
        process = psutil.Process(pid)
        process.send_signal(signal.SIGTERM)
        process.wait(_LIMIT_S)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        print(f"switchyard: process {pid} has not ended after {_LIMIT_S:.0f} s; kill it if it must go now")
        return FAILED
    print(f"[{time.strftime('%H:%M:%S')}] stopped", flush=True)
    return 0
