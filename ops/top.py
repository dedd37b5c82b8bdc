"""``switchyard top``."""

import argparse
import contextlib
import json
import os
import select
import shutil
import sys
from collections.abc import Iterator

from ops.api_client import ApiClient, add_cluster_arguments, connect
from ops.top_screen import screen

DESCRIPTION = """\
Watch a running cluster: engines, expert workers with their load, and what happened last, live.

  switchyard top                  on a terminal until q or Ctrl-C; elsewhere once
  switchyard top --once
  switchyard top --json           what the web console shows, once, as JSON

Keys: q leaves, s sorts the workers by shard or by load.

--json prints {"time_s", "trouble", "status": as `switchyard status --json`, "events", "actions",
  "nodes": [{"id", "name", "address", "alive", "cpus", "gpus", "memory_bytes"}],
  "incidents": [{"title", "severity", "subject", "why", "begin_s", "end_s", "done"}],
  "samples": [{"time_s", "running", "waiting", "workers", "kv_cache_used", "generated_per_s", "prompt_per_s", ..}],
  "about": {"model", "licence", ..}, "can": {action: {..}}}
"""

_EVERY_S = 1.0
_PAGE = (120, 100_000)  # columns and rows where there is no terminal
_ENTER, _LEAVE = "\033[?1049h\033[?25l", "\033[?1049l\033[?25h"
_HOME, _CLEAR_LINE, _CLEAR_REST = "\033[H", "\033[K", "\033[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="print it once and end")
    parser.add_argument("--json", action="store_true", help="print JSON, once")
    add_cluster_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    client = connect(arguments)
    if arguments.json:
        print(json.dumps(client.get("/api/view")))
    elif arguments.once or not (sys.stdout.isatty() and sys.stdin.isatty()):
        print("\n".join(screen(client.get("/api/view"), *_PAGE)))
    else:
        with contextlib.suppress(KeyboardInterrupt), _full_screen():
            _watch(client)
    return 0


def _watch(client: ApiClient) -> None:
    by_load = False
    while True:
        columns, rows = shutil.get_terminal_size()
        lines = screen(client.get("/api/view"), columns, rows, colours=True, by_load=by_load)
        sys.stdout.write(_HOME + "".join(f"{line}{_CLEAR_LINE}\n" for line in lines[: rows - 1]) + _CLEAR_REST)
        sys.stdout.flush()
        key = _key(_EVERY_S)
        if key == "q":
            return
        by_load ^= key == "s"


def _key(timeout_s: float) -> str:
    """What was pressed within that time, else empty; it is what makes the screen wait."""
    ready, _, _ = select.select([sys.stdin], [], [], timeout_s)
    return os.read(sys.stdin.fileno(), 1).decode(errors="replace") if ready else ""


@contextlib.contextmanager
def _full_screen() -> Iterator[None]:
    """Meanwhile a screen of our own, without a cursor, and keys without Enter. The terminal is as before afterwards."""
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        sys.stdout.write(_ENTER)
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
