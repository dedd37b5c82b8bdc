"""A team that waits sleeps with all its threads, rings first, and comes back for events, time-outs and signals."""

import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster.gang import Gang, _team_wait

ROOT = Path(__file__).parents[2]

ASLEEP = """
import select, time, torch
torch.set_num_threads(2)
from cluster.gang import Gang
epoll = select.epoll()

def cpu_s(wait):
    torch.zeros(1 << 20).add_(1)  # leaves the team's other thread spinning
    begin_s = time.process_time()
    wait()
    return time.process_time() - begin_s

alone = min(cpu_s(lambda: epoll.poll(0.015)) for _ in range(5))
gang = Gang(epoll)
together = min(cpu_s(lambda: gang.poll(0.015, 4)) for _ in range(5))
assert together < 0.004 < 0.008 < alone, (together, alone)
"""


def test_no_thread_of_the_team_spins_while_it_waits():
    environment = {**os.environ, "OMP_WAIT_POLICY": "active"}
    done = subprocess.run(
        [sys.executable, "-c", ASLEEP], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=["team", "alone"])
def gang(request, monkeypatch):
    assert _team_wait() is not None, "make install builds it"
    if request.param == "alone":
        monkeypatch.setattr("cluster.gang._team_wait", lambda: None)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    epoll = select.epoll()
    yield Gang(epoll)
    epoll.close()


def bell() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def test_an_event_ends_the_wait_and_every_bell_was_rung_before(gang):
    mine, theirs = bell(), [bell(), bell()]
    gang._epoll.register(mine, select.EPOLLIN)

    def answer():
        for fd in theirs:
            select.select([fd], [], [])
        os.eventfd_write(mine, 1)

    peer = threading.Thread(target=answer)
    peer.start()
    assert gang.poll(30, 4, theirs) == [(mine, select.EPOLLIN)]
    peer.join()
    assert [os.eventfd_read(fd) for fd in theirs] == [1, 1]
    for fd in (mine, *theirs):
        os.close(fd)


@pytest.mark.parametrize("timeout_s", [0, 0.01, 0.05])
def test_time_is_up(gang, timeout_s):
    begin_s = time.monotonic()
    assert gang.poll(timeout_s, 4) == []
    assert time.monotonic() - begin_s >= timeout_s


def test_more_bells_than_fit_are_rung_too(gang):
    many = [bell() for _ in range(70)]
    assert gang.poll(0.001, 4, many) == []
    assert [os.eventfd_read(fd) for fd in many] == [1] * 70
    for fd in many:
        os.close(fd)
