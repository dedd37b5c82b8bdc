"""A module that a nursery forks is what Python would make of it; without a nursery it is just that."""

import json
import os
import subprocess
import sys

import psutil

from model.nursery_client import NURSERY, forks_of
from tests.nurseries import ROOT, small_nursery

TOLD = ROOT / "tests/told.py"


def start(nursery: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    environment = {**os.environ, NURSERY: nursery, "COLOUR": "red"}
    command = [sys.executable, "-m", "model.forked_python", "tests.told", "--answer", "42"]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, cwd=ROOT, text=True)


def test_it_outlives_the_command_and_ends_as_pythons_do() -> None:
    with small_nursery(is_cpu=True) as (nursery, _), start(nursery) as launcher:
        assert launcher.stdin is not None and launcher.stdout is not None and launcher.stderr is not None
        found = json.loads(launcher.stdout.readline())
        assert launcher.wait(10) == 0
        fork = psutil.Process(found["pid"])
        assert fork.pid != launcher.pid
        assert found == {
            "argv": [str(TOLD), "--answer", "42"],
            "pid": fork.pid,
            "group": fork.pid,
            "colour": "red",
        }
        assert forks_of(nursery, launcher.pid) == []  # that pid may be another's by now
        launcher.stdin.write("3\n")
        launcher.stdin.close()
        assert launcher.stdout.read() == "farewell\n"
        assert launcher.stderr.read() == "a word\n"
        fork.wait(10)


def test_a_nursery_that_forks_no_modules_leaves_it_to_python() -> None:
    with small_nursery(is_cpu=False) as (nursery, _):
        assert "starts without it, and takes longer" in words_of_python(nursery)


def test_without_a_nursery_it_is_python() -> None:
    assert words_of_python("nobody") == "a word\n"


def words_of_python(nursery: str) -> str:
    """What the command says on stderr, after it has been seen to be the module itself."""
    with start(nursery) as python:
        assert python.stdin is not None and python.stdout is not None and python.stderr is not None
        found = json.loads(python.stdout.readline())
        assert found["pid"] == python.pid
        assert found["argv"] == [str(TOLD), "--answer", "42"]
        python.stdin.write("3\n")
        python.stdin.close()
        assert python.stdout.read() == "farewell\n"
        assert python.wait(10) == 3
        return python.stderr.read()
