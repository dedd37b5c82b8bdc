"""``switchyard keys``: the API keys that HTTP asks for. Works on a file; a running cluster notices within a second."""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

from cluster.api_keys import (
    KeyRecord,
    changing,
    read_ring,
    with_new_key,
    with_prompt_log,
    with_revoked_key,
    with_rotated_key,
)

DESCRIPTION = """\
Make, list, replace and revoke the API keys that clients send as `Authorization: Bearer KEY`.

  switchyard keys add alice                                     prints the key, once; only its hash is kept
  switchyard keys add batch --requests-per-minute 60 --concurrent 4
  switchyard keys list
  switchyard keys rotate alice --keep-old 86400                 a new key; the old one is good for another day
  switchyard keys revoke alice
  switchyard keys log-prompts alice on                          her prompts and answers go to the engines' logs

  switchyard serve --host 0.0.0.0                               asks for these keys
  switchyard serve --api-keys keys.json                         asks for the keys of another file, on loopback too

A running cluster takes changes over within a second. --file names another file than ~/.config/switchyard/keys.json.
"""

_DAY_S = 86400


def default_file() -> Path:
    """$XDG_CONFIG_HOME/switchyard/keys.json, or the same below ~/.config."""
    configured = os.environ.get("XDG_CONFIG_HOME")
    return (Path(configured) if configured else Path.home() / ".config") / "switchyard" / "keys.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="keys_command", metavar="COMMAND", required=True)
    add = _command(commands, "add", "make a key and print it, once", "switchyard keys add batch --concurrent 4")
    add.add_argument("name", help="who or what it is for: letters, digits and . _ @ -")
    add.add_argument("--requests-per-minute", type=int, metavar="N", help="refuse more with 429 (default: no limit)")
    add.add_argument("--concurrent", type=int, metavar="N", help="refuse more at the same time (default: no limit)")
    add.add_argument("--log-prompts", action="store_true", help="log what it asks and is answered (default: never)")
    _command(commands, "list", "show the keys; their secrets are not kept", "switchyard keys list --json")
    revoke = _command(commands, "revoke", "make a key worthless", "switchyard keys revoke alice")
    rotate = _command(
        commands, "rotate", "replace a key, with its name and limits", "switchyard keys rotate alice --keep-old 3600"
    )
    log = _command(
        commands,
        "log-prompts",
        "log a key's prompts and answers, or stop that",
        "switchyard keys log-prompts alice off",
    )
    for each in (revoke, rotate, log):
        each.add_argument("key", help="its name or id")
    log.add_argument("state", choices=("on", "off"))
    rotate.add_argument(
        "--keep-old",
        type=float,
        default=_DAY_S,
        metavar="SECONDS",
        help="time for which the former key is good as well (default: a day; 0: from now on it is worthless)",
    )


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary.capitalize()}.\n\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--file", type=Path, default=default_file(), help=f"the keys (default: {default_file()})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.keys_command == "list":
        _print_list(arguments)
        return 0
    key = None
    with changing(arguments.file) as rings:
        if arguments.keys_command == "add":
            limits = (arguments.requests_per_minute, arguments.concurrent)
            rings[0], record, key = with_new_key(rings[0], arguments.name, time.time(), *limits, arguments.log_prompts)
        elif arguments.keys_command == "rotate":
            rings[0], record, key = with_rotated_key(rings[0], arguments.key, time.time(), arguments.keep_old)
        elif arguments.keys_command == "log-prompts":
            rings[0], record = with_prompt_log(rings[0], arguments.key, arguments.state == "on")
        else:
            rings[0], record = with_revoked_key(rings[0], arguments.key, time.time())
    if arguments.json:
        print(json.dumps({**_public(record), **({"key": key} if key else {})}))
    elif arguments.keys_command == "log-prompts":
        words = "are logged by the engines" if record.log_prompts else "are not logged any more"
        print(f"prompts and answers of {record.name} ({record.id}) {words}")
    elif key is None:
        print(f"revoked {record.name} ({record.id})")
    else:
        print(f"{record.name} ({record.id}), kept in {arguments.file}. The key, which is not shown again:\n\n  {key}\n")
    return 0


def _print_list(arguments: argparse.Namespace) -> None:
    records = read_ring(arguments.file).records if arguments.file.exists() else ()
    if arguments.json:
        print(json.dumps([_public(record) for record in records]))
        return
    if not records:
        print(f"no keys in {arguments.file}. `switchyard keys add NAME` makes one.")
        return
    print(f"{'id':12}  {'name':20}  {'per minute':>10}  {'at once':>7}  {'made':10}  state")
    for record in records:
        made = time.strftime("%Y-%m-%d", time.gmtime(record.created_s))
        rate, at_once = record.requests_per_minute or "-", record.concurrent or "-"
        print(f"{record.id}  {record.name:20}  {rate:>10}  {at_once:>7}  {made}  {_state(record, time.time())}")


def _state(record: KeyRecord, now_s: float) -> str:
    if record.revoked_s is not None:
        return "revoked"
    has_former = record.former_until_s is not None and now_s < record.former_until_s
    return "valid" + ", the former key too" * has_former + ", prompts are logged" * record.log_prompts


def _public(record: KeyRecord) -> dict[str, object]:
    """What may be shown to anybody: no hashes."""
    return {name: value for name, value in dataclasses.asdict(record).items() if not name.endswith("sha256")}
