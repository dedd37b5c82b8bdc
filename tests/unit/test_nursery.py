"""Workers are forked, watched and cleaned up after; here with a nursery that has nothing to import."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator

import psutil
import pytest

from deployments import nursery as client
from model.nursery_client import NURSERY, NurseryFailed
from tests.nurseries import small_nursery

_SETUP = """
import signal, socket, sys
from cluster.auth import Peer

def work(arguments, others):
    # What a worker does: words about itself, then whatever it is told.
    print(os.environ.get("COLOUR"), "HOME" in os.environ, sorted(os.listdir("/proc/self/fd"))[:-1], flush=True)
    for line in sys.stdin:
        if line == "freeze\\n":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            print("frozen", flush=True)
            signal.pause()
        return int(line)
    return 0

if "STRANGERS" in os.environ:
    nursery.peer = lambda connection: Peer(1, os.getuid() + 1)
nursery._ORPHAN_LIMIT_S = 0.2
nursery._be_a_worker = work
"""


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    name = client.nursery_name()
    monkeypatch.setenv(NURSERY, name)
    return name


@pytest.fixture
def guardian() -> Iterator[subprocess.Popen[bytes]]:
    """The process for whose life the nursery is there."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.fixture
def nursery(name: str, guardian: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    with small_nursery(_SETUP, name=name, watched=guardian.pid) as (_, process):
        yield process


class Forked:
    """A worker and the two ends of its pipes."""

    def __init__(self, child: client.Child, orders: int, words: int) -> None:
        self.child = child
        self.orders = os.fdopen(orders, "wb", buffering=0)
        self.words = os.fdopen(words, "rb")

    def close(self) -> None:
        self.orders.close()
        self.words.close()


async def fork(**environment: str) -> Forked:
    their_stdin, orders = os.pipe()
    words, their_stdout = os.pipe()
    try:
        return Forked(await client.fork_worker(environment, their_stdin, their_stdout), orders, words)
    finally:
        os.close(their_stdin)
        os.close(their_stdout)


def test_a_worker_has_its_own_environment_and_descriptors_and_tells_its_status(nursery):
    async def life() -> None:
        first, second = await fork(COLOUR="red"), await fork(COLOUR="blue")
        assert first.child.pid != second.child.pid and first.child.status is None
        assert second.words.readline() == b"blue False ['0', '1', '2']\n"
        assert first.words.readline() == b"red False ['0', '1', '2']\n"
        first.orders.write(b"7\n")
        assert await first.child.wait() == 7 == first.child.status
        second.child.kill()
        assert await second.child.wait() == -signal.SIGKILL
        second.child.kill()  # of one that has ended does nothing, though its pid may be another's by now
        first.close()
        second.close()

    asyncio.run(life())


def test_who_leaves_leaves_no_worker_behind(nursery):
    async def life() -> psutil.Process:
        forked = await fork()
        forked.words.readline()
        forked.orders.write(b"freeze\n")
        assert forked.words.readline() == b"frozen\n"
        forked.child._connection.shutdown(2)
        process = psutil.Process(forked.child.pid)
        assert await forked.child.wait() == -signal.SIGKILL
        forked.close()
        return process

    process = asyncio.run(life())
    process.wait(10)
    assert not process.is_running()


def test_the_nursery_ends_with_its_guardian_when_the_last_worker_has(nursery, guardian):
    async def life() -> None:
        forked = await fork()
        guardian.kill()
        guardian.wait()
        another = await fork()
        forked.orders.write(b"0\n")
        assert await forked.child.wait() == 0
        assert nursery.poll() is None
        another.orders.close()
        assert await another.child.wait() == 0
        forked.close()
        another.words.close()

    asyncio.run(life())
    assert nursery.wait(10) == 0


def test_a_worker_outlives_the_nursery_and_its_end_is_noticed(nursery):
    async def life() -> None:
        forked = await fork()
        forked.words.readline()
        nursery.kill()
        nursery.wait()
        forked.orders.write(b"3\n")
        assert await forked.child.wait() == -signal.SIGKILL  # nobody was left to tell
        forked.close()

    asyncio.run(life())


def test_bad_requests_are_refused_and_harm_nobody(nursery, name):
    for request in (b"nonsense\n", b"{}\n", b'{"environment": {}}\n'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect("\0" + name)
            connection.sendall(request)
            assert connection.recv(100) == b""

    async def life() -> None:
        forked = await fork()
        forked.orders.close()
        assert await forked.child.wait() == 0
        forked.words.close()

    asyncio.run(life())
    nursery.kill()
    assert nursery.stderr.read().count(b"a request was refused") == 3


def test_processes_of_other_users_get_nothing(monkeypatch, name, guardian):
    monkeypatch.setenv("STRANGERS", "1")
    with small_nursery(_SETUP, name=name, watched=guardian.pid) as (_, process):
        with pytest.raises(NurseryFailed):
            asyncio.run(fork())
        process.kill()
        assert process.stderr is not None and b"a process of another user" in process.stderr.read()


def test_without_a_node_s_nursery_a_replica_starts_its_own(monkeypatch):
    monkeypatch.delenv(NURSERY, raising=False)
    monkeypatch.setattr(client, "_own", None)
    started: list[str] = []

    async def life() -> None:
        for _ in range(2):
            forked = await fork()
            forked.orders.close()
            assert await forked.child.wait() == 0
            forked.words.close()

    with contextlib.ExitStack() as ends:

        def start(name: str) -> subprocess.Popen[bytes]:
            started.append(name)
            return ends.enter_context(small_nursery(_SETUP, name=name))[1]

        monkeypatch.setattr(client, "start_nursery", start)
        asyncio.run(life())
    assert len(started) == 1


def test_a_node_s_nursery_that_ends_has_a_successor(monkeypatch, name, tmp_path):
    monkeypatch.setattr(client, "_SUCCESSOR_LIMIT_S", 30.0)
    monkeypatch.setattr(client, "_SHORTEST_LIFE_S", 0.0)
    started: list[subprocess.Popen[bytes]] = []
    is_stopping = threading.Event()

    async def life() -> None:
        forked = await fork()
        forked.orders.close()
        assert await forked.child.wait() == 0
        forked.words.close()

    with contextlib.ExitStack() as ends:

        def start(name: str, _output: int) -> subprocess.Popen[bytes]:
            started.append(ends.enter_context(small_nursery(_SETUP, name=name))[1])
            return started[-1]

        monkeypatch.setattr(client, "start_nursery", start)
        client.keep_nursery(name, tmp_path / "log", is_stopping)
        (keeper,) = (thread for thread in threading.enumerate() if thread.name == "nursery")
        asyncio.run(life())
        started[0].kill()
        started[0].wait()
        asyncio.run(life())
        is_stopping.set()
        started[1].kill()
        keeper.join(10)
        assert not keeper.is_alive()
    assert len(started) == 2


def test_one_that_cannot_start_is_told(monkeypatch):
    monkeypatch.delenv(NURSERY, raising=False)
    monkeypatch.setattr(client, "start_nursery", lambda name: subprocess.Popen(["false"]))
    monkeypatch.setattr(client, "_own", None)
    with pytest.raises(NurseryFailed, match="did not start"):
        asyncio.run(fork())
