"""`switchyard top`, the completion scripts and the versions, without a terminal and without a cluster."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ops.cli import COMMANDS, main
from ops.console.history import History
from ops.top_screen import screen
from tests.simulated import SimulatedCluster

ROOT = Path(__file__).parents[2]
ESCAPES = re.compile(r"\033\[[0-9;?]*[a-zA-Z]")


def view_of(cluster: SimulatedCluster, **changes: object) -> dict:
    history = History()
    status = cluster.status()
    history.add(1000.0, status)
    view = {
        "trouble": "", "status": status, "events": cluster.events, "actions": [], "samples": list(history.samples),
    }  # fmt: skip
    return {**view, **changes}


def test_the_screen_fits_any_terminal():
    view = view_of(SimulatedCluster(64, 8))
    for columns, rows in ((80, 24), (40, 12), (200, 60)):
        lines = screen(view, columns, rows, colours=True)
        assert len(lines) < rows and max(len(ESCAPES.sub("", line)) for line in lines) <= columns
    assert any("more workers" in line for line in screen(view, 80, 24))


def test_the_screen_says_what_matters():
    cluster = SimulatedCluster(2, 2)
    cluster.kill(next(iter(cluster.workers)))
    action = {"name": "drain", "words": ["takes nothing new"], "end_s": None}
    lines = screen(view_of(cluster, trouble="lost", actions=[action]), 120, 60)
    text = "\n".join(lines)
    assert "\033" not in text and "workers 3 of 4 online" in text and "shard 0: 1 of 2 replicas" in text
    assert "no answer from the router: lost" in text and "under way: drain: takes nothing new" in text
    assert "worker_lost" in lines[-1]
    head = next(line for line in lines if line.startswith("WORKER"))
    row = next(line for line in lines if line.startswith("experts-"))
    assert row.index("online") == head.index("STATE") and len(row) == len(head)
    assert screen({"status": {}, "trouble": "gone"}, 80, 24) == ["gone"]


def test_workers_are_sorted_by_load_on_request():
    lines = screen(view_of(SimulatedCluster(3, 3)), 120, 60, by_load=True)
    bars = [line.count("|") for line in lines if line.startswith("experts-")]
    assert len(bars) == 9 and bars == sorted(bars, reverse=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_is_completed(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS) and "replicas" in script and "switchyard status --json" in script


def test_bash_completes_with_the_script(tmp_path):
    (tmp_path / "switchyard").write_text('#!/bin/sh\necho \'{"id": "experts-1-0a"}, {"id": "experts-0-0b"}\'\n')
    (tmp_path / "switchyard").chmod(0o755)
    script = subprocess.run(
        [sys.executable, "-m", "ops.cli", "completion", "bash"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    def complete(*words: str) -> list[str]:
        line = (
            f"COMP_WORDS=(switchyard {' '.join(words)}); COMP_CWORD={len(words)}; _switchyard; echo ${{COMPREPLY[@]}}"
        )
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", f"{script}\n{line}"], env=path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert complete("re") == ["restart"]
    assert complete("drain", "ex") == ["experts-0-0b", "experts-1-0a"]
    assert complete("scale", "1") == ["1"]
    assert complete("status", "--j") == ["--json"]
    assert complete("completion", "f") == ["fish"]


def test_versions_are_for_people_and_for_programs(capsys):
    assert main(["version"]) == 0 and "Python 3." in capsys.readouterr().out
    assert main(["version", "--json"]) == 0
    assert {"switchyard", "ray", "torch", "python"} <= set(json.loads(capsys.readouterr().out))
