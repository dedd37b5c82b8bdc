"""``switchyard doctor``: what may be wrong with this machine, this installation and the clusters that run on it."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

from cluster.errors import SwitchyardError
from ops import diagnosis
from ops.api_client import ApiClient
from ops.diagnosis import Finding, Grade
from ops.runs import Run, living_runs

DESCRIPTION = """\
Check the installation, the machine, and every cluster of yours that runs here; say what to do.

  switchyard doctor
  switchyard doctor --json

Exit status 1 when something fails.
"""

_SYMBOLS = {Grade.OK: "ok  ", Grade.WARN: "warn", Grade.FAIL: "FAIL"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON list of findings")


def run(arguments: argparse.Namespace) -> int:
    findings: list[Finding] = []
    for finding in _all_findings():
        findings.append(finding)
        if not arguments.json:
            print(_line(finding), flush=True)
    if arguments.json:
        print(json.dumps([{**dataclasses.asdict(each), "grade": each.grade.value} for each in findings]))
    return 1 if any(each.grade is Grade.FAIL for each in findings) else 0


def _line(finding: Finding) -> str:
    advice = f"\n      {finding.advice}" if finding.advice else ""
    return f"{_SYMBOLS[finding.grade]}  {finding.subject}: {finding.text}{advice}"


def _all_findings() -> Iterable[Finding]:
    for check in diagnosis.CHECKS:
        yield from check()
    runs = living_runs()
    if not runs:
        yield Finding(Grade.OK, "clusters", "none of yours runs on this machine")
    for each in runs:
        yield from cluster_findings(each, ApiClient(each.ops, each.token).get)


def cluster_findings(cluster: Run, get: Callable[[str], Any]) -> Iterable[Finding]:
    """What a cluster says about itself; `get` fetches a path of its ops API."""
    name = f"{cluster.http} ({cluster.model})"
    try:
        status, integrity = get("/api/status"), get("/api/integrity")
    except SwitchyardError as error:
        yield Finding(Grade.FAIL, name, str(error), f"Its logs are in {cluster.logs}.")
        return
    for shard in status["missing_shards"]:
        advice = "`switchyard events` says why; Serve starts another by itself."
        yield Finding(Grade.FAIL, name, f"shard {shard} has no worker: calls wait for one", advice)
    for shard in status["shards"]:
        online = sum(r["state"] == "online" and r["role"] == "primary" for r in shard["replicas"])
        if online < shard["wanted"]:
            yield Finding(Grade.WARN, name, f"shard {shard['id']} has {online} of {shard['wanted']} replicas")
    stalled = [engine["id"] for engine in status["engines"] if engine["state"] == "stalled"]
    if not any(engine["state"] == "ready" for engine in status["engines"]):
        yield Finding(Grade.FAIL, name, "no engine is ready", f"Its logs are in {cluster.logs}.")
    elif stalled:
        yield Finding(Grade.WARN, name, f"waiting for experts: {', '.join(stalled)}")
    broken = [each for each in integrity if not each["ok"]]
    for each in broken:
        yield Finding(
            Grade.FAIL, name, f"{each['subject']}: {each['text']}", "Please report this: nothing may be lost."
        )
    if not broken:
        yield Finding(
            Grade.OK, name, f"integrity of {len(integrity)} engines and workers: nothing lost, nothing leaked"
        )
