"""multiprocessing through the nursery: arguments, descriptors, status, signals, ends; real forks of a small nursery."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Lock
from pathlib import Path

import psutil
import pytest

from deployments.nursery import nursery_name
from model.forked_process import NurseryContext
from model.nursery_client import NURSERY, forks_of
from tests.nurseries import small_nursery

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def nursery() -> Iterator[str]:
    """Its name."""
    with small_nursery() as (name, _):
        yield name


@pytest.fixture
def name(nursery: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(NURSERY, nursery)
    return nursery


def _tell(pipe: Connection, lock: Lock) -> None:
    """In the fork: who and where this is, while the lock is held."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    with lock:
        pipe.send((os.getpid(), parent.pid, os.environ["COLOUR"], str(Path.cwd())))


def _wait_for_ever(pipe: Connection) -> None:
    pipe.send(os.getpid())
    signal.pause()


def _exit(status: int) -> None:
    sys.exit(status)


def _end_with_parent(pipe: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    pipe.send(os.getpid())
    parent.join()


def _have_a_child(pipe: Connection) -> None:
    """In the fork: one of its own, which finds out when this one ends."""
    theirs = NurseryContext().Process(target=_end_with_parent, args=(pipe,))
    theirs.start()
    signal.pause()


def test_a_fork_has_its_arguments_the_environment_and_descriptors(name, monkeypatch):
    monkeypatch.setenv("COLOUR", "red")
    context = NurseryContext()
    ours, theirs = context.Pipe()
    lock = context.Lock()
    process = context.Process(target=_tell, args=(theirs, lock), name="teller")
    with lock:
        process.start()
        theirs.close()
        assert not ours.poll(0.2), "it waits for the lock, which is the same on both sides"
        assert forks_of(name, os.getpid()) == [process.pid]
    assert ours.recv() == (process.pid, os.getpid(), "red", str(Path.cwd()))
    process.join()
    assert process.exitcode == 0 and not process.is_alive()
    assert forks_of(name, os.getpid()) == []


@pytest.mark.parametrize("status", [0, 3])
def test_the_exit_status_is_told(name, status):
    process = NurseryContext().Process(target=_exit, args=(status,))
    process.start()
    assert wait([process.sentinel], 30) == [process.sentinel]
    process.join()
    assert process.exitcode == status


def test_an_exception_is_printed_and_is_status_1(name, capfd):
    process = NurseryContext().Process(target=_exit, args=("no number",))
    process.start()
    process.join()
    assert process.exitcode == 1
    assert "no number" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_arrive(name, number):
    context = NurseryContext()
    ours, theirs = context.Pipe()
    process = context.Process(target=_wait_for_ever, args=(theirs,), daemon=True)
    process.start()
    assert ours.recv() == process.pid
    assert process.exitcode is None and process.is_alive()
    process.terminate() if number == signal.SIGTERM else process.kill()
    process.join()
    assert process.exitcode == -number
    process.kill()  # of one that has ended does nothing, though its pid may be another's by now
    process.close()


def test_a_fork_of_a_fork_learns_of_its_parent_s_end(name):
    context = NurseryContext()
    ours, theirs = context.Pipe()
    process = context.Process(target=_have_a_child, args=(theirs,))
    process.start()
    grandchild = psutil.Process(ours.recv())
    assert forks_of(name, process.pid) == [grandchild.pid]
    process.kill()
    grandchild.wait(30)
    assert not grandchild.is_running()


def test_without_its_nursery_a_process_starts_all_the_same(name, monkeypatch):
    monkeypatch.setenv(NURSERY, nursery_name())
    monkeypatch.setenv("COLOUR", "blue")
    context = NurseryContext()
    ours, theirs = context.Pipe()
    lock = context.Lock()
    process = context.Process(target=_tell, args=(theirs, lock))
    process.start()
    assert ours.recv()[:3] == (process.pid, os.getpid(), "blue")
    process.join()
    assert process.exitcode == 0
    assert forks_of(name, os.getpid()) == []
