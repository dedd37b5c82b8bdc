"""A module that a nursery forks is what Python would make of it; without a nursery it is just that."""

import json
import os
import signal
import socket
import subprocess
import sys

import psutil

from model import nursery_client
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


def test_an_answer_counts_even_if_the_nursery_is_done_before_the_client(monkeypatch) -> None:
    """Else there would be two processes where one is wanted: the fork, and the Python in its place."""
    ours, theirs = socket.socketpair()
    send_fds = socket.send_fds

    def send_and_be_answered(*arguments):
        sent = send_fds(*arguments)
        with theirs:
            send_fds(theirs, [b'{"pid": 42}\n'], [2])
            theirs.recv(1 << 20)
        return sent

    monkeypatch.setattr(socket, "send_fds", send_and_be_answered)
    fork = nursery_client.ask(ours, nursery_client.MODULE, {}, (0, 1, 2), ["tests.told"])
    os.close(fork.pidfd)
    fork.connection.close()
    assert fork.pid == 42


def test_a_client_that_does_not_wait_for_its_answer_has_no_fork() -> None:
    words, stdout = os.pipe()
    with small_nursery(is_cpu=True) as (nursery, process):
        connection = nursery_client.connect(nursery)
        assert connection is not None
        process.send_signal(signal.SIGSTOP)
        request = {"work": nursery_client.MODULE, "arguments": ["tests.told"], "environment": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, stdout, 2])
        connection.close()
        os.close(stdout)
        process.send_signal(signal.SIGCONT)
        assert os.read(words, 100) == b""
        assert start_and_end(nursery) == 0, "the nursery goes on"
    os.close(words)


def start_and_end(nursery: str) -> int:
    """The exit status of a launcher whose fork has ended."""
    with start(nursery) as launcher:
        launcher.communicate("0\n")
        return launcher.returncode


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
