"""What a dispatcher does about replicas that are silent, slow, sick or hostile, against real servers."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch

from cluster.blame import Cause
from cluster.fakes import ProcessWorker, ThreadWorker, ToyExperts, eventually
from cluster.routing import Replica, Role
from tests.toy_engine import SHAPE, WHOLE, Engine


@pytest.fixture
def things() -> Iterator[contextlib.ExitStack]:
    """Whatever a test enters here is closed after it, last first."""
    with contextlib.ExitStack() as stack:
        yield stack


def make_worker(things: contextlib.ExitStack, **options) -> ThreadWorker:
    worker = ThreadWorker(SHAPE, WHOLE, **options)
    things.callback(worker.close)
    return worker


class Sick:
    """Computes what ToyExperts does, and then spoils it while `is_sick`."""

    def __init__(self, value: float) -> None:
        self._toy = ToyExperts(WHOLE.experts)
        self._value = value
        self.is_sick = True
        self.num_calls = 0

    def __call__(self, layer, x_TD, weights_TK, ids_TK, out_TD, complete) -> None:
        self.num_calls += 1
        self._toy.compute(layer, x_TD, weights_TK, ids_TK, out_TD, complete)
        if self.is_sick:
            out_TD[-1, -1] = self._value


def test_a_frozen_replica_costs_a_moment_once_and_is_not_asked_meanwhile(things):
    frozen, other = (ProcessWorker(SHAPE, WHOLE) for _ in range(2))
    for worker in (frozen, other):
        things.callback(worker.kill)
    engine = Engine(things)
    engine.adopt(frozen.replica("frozen"), other.replica("other"))
    for _ in range(40):
        engine.call()
    os.kill(frozen.process.pid, signal.SIGSTOP)
    times_s = [engine.call(num_tokens=1 + i % 5) for i in range(60)]
    assert max(times_s) < 1.0
    assert sum(taken_s > 0.09 for taken_s in times_s) <= 1, "after the first it is suspected"
    assert engine.accused == [("frozen", Cause.SILENT)]
    assert engine.stats["suspected"] == ["frozen"]
    assert engine.stats["hedged"] == engine.stats["hedge_wins"] == 1
    os.kill(frozen.process.pid, signal.SIGCONT)
    assert eventually(lambda: engine.call() >= 0 and engine.stats["late_replies"] == 1)
    assert eventually(lambda: engine.call() >= 0 and engine.stats["suspected"] == [])
    messages = engine.stats["messages"]
    assert messages == engine.stats["calls"] + 1


def test_when_everybody_is_under_suspicion_suspicion_is_ignored_and_counted(things):
    frozen = ProcessWorker(SHAPE, WHOLE)
    things.callback(frozen.kill)
    sick = Sick(float("nan"))
    engine = Engine(things)
    engine.adopt(frozen.replica("frozen"), make_worker(things, compute=sick).replica("sick"))
    assert eventually(lambda: engine.call() >= 0 and ("sick", Cause.NOT_FINITE) in engine.accused)
    sick.is_sick = False
    os.kill(frozen.process.pid, signal.SIGSTOP)
    engine.call()
    assert {name for name, _ in engine.accused} == {"frozen", "sick"}
    engine.call()
    assert engine.stats["suspicion_ignored"] > 0
    assert sick.num_calls >= 2
    os.kill(frozen.process.pid, signal.SIGCONT)


def test_the_first_answer_counts_also_when_it_is_the_earlier_tries(things):
    gates = [threading.Event(), threading.Event()]
    entered = [threading.Event(), threading.Event()]

    def compute(which):
        toy = ToyExperts(WHOLE.experts)

        def wait(*call) -> None:
            entered[which].set()
            assert gates[which].wait(20)
            toy.compute(*call)

        return wait

    workers = [make_worker(things, compute=compute(i)) for i in range(2)]
    for gate in gates:
        things.callback(gate.set)
    engine = Engine(things, attempt_timeout_s=0.05)
    engine.adopt(*(worker.replica(f"r{i}") for i, worker in enumerate(workers)))

    def open_the_first() -> None:
        for each in entered:
            assert each.wait(20)
        gates[0].set()

    opener = threading.Thread(target=open_the_first)
    opener.start()
    engine.call()
    opener.join()
    stats = engine.stats
    assert stats["messages"] == 2 and stats["hedged"] == 1
    assert stats["late_replies"] == 0
    gates[1].set()
    assert eventually(lambda: engine.call() >= 0 and engine.stats["late_replies"] == 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_asked_for_elsewhere(things, value):
    sick, healthy = Sick(value), make_worker(things)
    engine = Engine(things)
    engine.adopt(make_worker(things, compute=sick).replica("sick"), healthy.replica("healthy"))
    for _ in range(30):
        engine.call()
    assert engine.accused == [("sick", Cause.NOT_FINITE)]
    assert sick.num_calls == engine.stats["not_finite"] == 1, "suspected after the first"
    assert engine.stats["not_finite_kept"] == 0


def test_a_passing_sickness_of_the_only_replica_is_survived(things):
    sick = Sick(float("nan"))
    engine = Engine(things)
    worker = make_worker(things, compute=lambda *call: (sick(*call), setattr(sick, "is_sick", False)))
    engine.adopt(worker.replica("only"))
    engine.call()
    engine.call()
    assert engine.accused == [("only", Cause.NOT_FINITE)]


def test_what_comes_out_twice_is_the_models_own(things):
    """Both replicas say NaN: the input is to blame, nobody is accused, and the answer is what was computed."""
    workers = [make_worker(things, compute=Sick(float("nan"))) for _ in range(2)]
    engine = Engine(things)
    engine.adopt(*(worker.replica(f"r{i}") for i, worker in enumerate(workers)))
    x_TD, weights_TK = torch.ones(2, SHAPE.hidden), torch.ones(2, SHAPE.top_k)
    ids_TK = torch.zeros(2, SHAPE.top_k, dtype=torch.int32)
    out_TD = torch.zeros_like(x_TD)
    engine.dispatcher.finish(engine.dispatcher.start(0, x_TD, weights_TK, ids_TK), out_TD)
    assert out_TD[-1, -1].isnan() and out_TD[0].isfinite().all()
    assert engine.accused == []
    assert engine.stats["not_finite"] == engine.stats["not_finite_kept"] == 1


def test_a_shadow_serves_only_while_no_primary_can(things):
    shadow = make_worker(things)
    engine = Engine(things)
    shadow_replica = Replica(**{**vars(shadow.replica("shadow")), "role": Role.SHADOW})
    primary = ProcessWorker(SHAPE, WHOLE)
    things.callback(primary.kill)
    engine.adopt(primary.replica("primary"), shadow_replica)
    for _ in range(10):
        engine.call()
    assert shadow.toy.num_calls == 0
    primary.kill()
    for _ in range(10):
        assert engine.call() < 1.0
    assert shadow.toy.num_calls == 10
    back = make_worker(things)
    engine.adopt(back.replica("back"), shadow_replica)
    for _ in range(10):
        engine.call()
    assert shadow.toy.num_calls == 10 and back.toy.num_calls == 10


def test_two_silent_replicas_leave_the_third(things):
    workers = [ProcessWorker(SHAPE, WHOLE) for _ in range(3)]
    for worker in workers:
        things.callback(worker.kill)
    engine = Engine(things)
    engine.adopt(*(worker.replica(f"r{i}") for i, worker in enumerate(workers)))
    for _ in range(20):
        engine.call()
    for worker in workers[:2]:
        os.kill(worker.process.pid, signal.SIGSTOP)
    assert max(engine.call() for _ in range(20)) < 1.5
    workers[2].kill()
    os.kill(workers[0].process.pid, signal.SIGCONT)
    assert engine.call() < 1.5, "suspected, but the only one that answers"
    os.kill(workers[1].process.pid, signal.SIGCONT)
