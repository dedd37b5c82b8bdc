"""``switchyard events``."""

import argparse
import contextlib
import json
import time
from typing import Any

from ops.api_client import ApiClient, add_cluster_arguments, connect

DESCRIPTION = """\
What has happened in a cluster: workers that came, went and were suspected, shards without a worker, actions.

  switchyard events
  switchyard events --follow          goes on until Ctrl-C
  switchyard events --json            a JSON object per line
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", "-f", action="store_true", help="go on with what happens next")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    add_cluster_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    client = connect(arguments)
    events: list[dict[str, Any]] = client.get("/api/status")["events"]
    _print(events, arguments.json)
    if arguments.follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(client, events[-1]["time_s"] if events else 0.0, arguments.json)
    return 0


def _follow(client: ApiClient, last_s: float, as_json: bool) -> None:
    while True:
        events = client.get(f"/api/events?after={last_s!r}")
        _print(events, as_json)
        if events:
            last_s = events[-1]["time_s"]


def _print(events: list[dict[str, Any]], as_json: bool) -> None:
    for event in events:
        print(json.dumps(event) if as_json else event_line(event), flush=True)


def event_line(event: dict[str, Any]) -> str:
    """One line for people, in local time."""
    clock = time.strftime("%H:%M:%S", time.localtime(event["time_s"]))
    return f"{clock}  {event['kind']:<16}  {event['subject']}: {event['text']}"
