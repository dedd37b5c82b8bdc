"""Faults on order: each is really committed, costs no call, and is blamed on its cause."""

import contextlib
import os
from collections.abc import Iterator

import pytest

from cluster.blame import Cause
from cluster.errors import ConnectionLost, SwitchyardError
from cluster.fakes import ThreadWorker, eventually
from cluster.sabotage import BY_WORKER, Fault, Sabotage, SabotagedServer, Saboteur
from tests.toy_engine import SHAPE, WHOLE, Engine

# None: nobody has to go for it.
BLAMED_FOR = {
    Fault.SLOW: None,
    Fault.WRONG_SHAPE: Cause.MALFORMED,
    Fault.NOT_FINITE: Cause.NOT_FINITE,
    Fault.DROPPED_REPLY: Cause.SILENT,
    Fault.DOUBLED_REPLY: None,
    Fault.TRUNCATED_FRAME: Cause.MALFORMED,
    Fault.WRONG_SECRET: Cause.UNREACHABLE,  # who does not know our proof closes before it has shown its own
    Fault.WRONG_MODEL: Cause.REFUSED,
}


@pytest.fixture
def things() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def make_worker(things: contextlib.ExitStack, tcp: bool, **options) -> ThreadWorker:
    worker = ThreadWorker(SHAPE, WHOLE, tcp=tcp, **options)
    things.callback(worker.close)
    return worker


def test_there_is_an_expectation_for_every_fault_of_a_worker():
    assert set(BLAMED_FOR) == BY_WORKER


@pytest.mark.parametrize("tcp", [False, True], ids=["shm", "tcp"])
@pytest.mark.parametrize("fault", BLAMED_FOR, ids=lambda fault: fault.value)
def test_no_call_is_lost_and_the_cause_is_named(things, fault, tcp):
    bad, good = make_worker(things, tcp, server=SabotagedServer), make_worker(things, tcp)
    engine = Engine(things, attempt_timeout_s=1.0)
    engine.adopt(bad.replica("bad"), good.replica("good"))
    for _ in range(10):
        engine.call()
    struck = bad.server.order(fault)
    assert eventually(lambda: engine.call() >= 0 and struck.is_set())
    for _ in range(20):
        engine.call()
    cause = BLAMED_FOR[fault]
    if cause is not None:
        assert eventually(lambda: engine.call() >= 0 and ("bad", cause) in engine.accused)
    assert {name for name, _ in engine.accused} <= {"bad"}
    bad.server.order(None)
    served = bad.toy.num_calls
    returns = fault not in (Fault.WRONG_SECRET, Fault.WRONG_MODEL)  # those are not asked again: they are replaced
    assert eventually(lambda: engine.call() >= 0 and bad.toy.num_calls > served, timeout_s=20 * returns) is returns


def test_a_counted_fault_ends_by_itself(things):
    bad = make_worker(things, False, server=SabotagedServer)
    engine = Engine(things)
    engine.adopt(bad.replica("bad"), make_worker(things, False).replica("good"))
    engine.call()
    struck = bad.server.order(Fault.NOT_FINITE, count=2)
    assert eventually(lambda: engine.call() >= 0 and engine.stats["not_finite"] == 2, timeout_s=20)
    assert struck.is_set()
    computed = bad.toy.num_calls
    assert eventually(lambda: engine.call() >= 0 and bad.toy.num_calls > computed + 5, timeout_s=20)
    assert engine.stats["not_finite"] == 2


def test_a_lost_answer_does_not_cost_its_slot_for_ever(things):
    """After the time that an answer may take, the connection is made anew, with all its slots."""
    bad = make_worker(things, False, server=SabotagedServer)
    engine = Engine(things, attempt_timeout_s=0.3)
    engine.adopt(bad.replica("bad"), make_worker(things, False).replica("good"))
    for _ in range(10):
        engine.call()
    bad.server.order(Fault.DROPPED_REPLY, count=2)
    assert eventually(lambda: engine.call() >= 0 and engine.stats["lost_links"] == 1, timeout_s=20)
    served = bad.toy.num_calls
    assert eventually(lambda: engine.call() >= 0 and bad.toy.num_calls > served)


def test_a_process_takes_orders_for_as_long_as_their_connection_lasts(things):
    bad = make_worker(things, False, server=SabotagedServer)
    Saboteur(bad.server)
    engine = Engine(things)
    engine.adopt(bad.replica("bad"), make_worker(things, False).replica("good"))
    sabotage = Sabotage(os.getpid(), Fault.SLOW)
    assert eventually(lambda: engine.call() >= 0 and bad.server._adopted is not None)
    assert eventually(lambda: engine.call() >= 0 and bad.server._adopted[2].is_set())
    assert sabotage.wait_struck(5)
    sabotage.close()
    assert eventually(lambda: bad.server._ordered is None)


def test_orders_to_whom_does_not_take_them_are_refused():
    with pytest.raises(ConnectionLost, match="fault_injection"):
        Sabotage(1, Fault.SLOW)
    with pytest.raises(SwitchyardError, match="sigkill"):
        Sabotage(os.getpid(), Fault.SIGKILL)
