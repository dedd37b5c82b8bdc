"""What a dispatcher does about replicas that are silent, slow, sick or hostile, against real servers."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from cluster.blame import Cause
from cluster.dispatcher import Dispatcher
from cluster.fakes import LocalExperts, ProcessWorker, ThreadWorker, ToyExperts, ToyShape, eventually
from cluster.placement import partition
from cluster.routing import Replica, Role

SHAPE = ToyShape()
WHOLE = partition(SHAPE.num_layers, SHAPE.num_experts, 1)[0]


@pytest.fixture
def things() -> Iterator[contextlib.ExitStack]:
    """Whatever a test enters here is closed after it, last first."""
    with contextlib.ExitStack() as stack:
        yield stack


class Engine:
    """A dispatcher with an oracle beside it, and a list of what it accused whom of."""

    def __init__(self, things: contextlib.ExitStack, **options) -> None:
        self.accused: list[tuple[str, Cause]] = []
        settings = {"engine_id": "engine-0", "secret": SHAPE.secret, "expert_timeout_s": 60.0, **options}
        self.dispatcher = Dispatcher(
            hidden_size=SHAPE.hidden,
            top_k=SHAPE.top_k,
            dtype=SHAPE.dtype,
            max_tokens=SHAPE.max_tokens,
            on_accused=lambda name, cause: self.accused.append((name, cause)),
            **settings,
        )
        things.callback(self.dispatcher.close)
        things.callback(self.dispatcher.check_integrity)
        self._oracle = LocalExperts([(WHOLE, ToyExperts(WHOLE.experts).compute)], SHAPE.num_experts)
        self._epoch = 0

    def adopt(self, *replicas: Replica) -> None:
        self._epoch += 1
        self.dispatcher.update(SHAPE.table(self._epoch, [WHOLE], replicas))

    def call(self, num_tokens: int = 3, layer: int = 0) -> float:
        """One layer call whose answer is checked; returns how long it took, in seconds."""
        g = torch.Generator().manual_seed(num_tokens)
        x_TD = torch.randn(num_tokens, SHAPE.hidden, generator=g)
        weights_TK = torch.rand(num_tokens, SHAPE.top_k, generator=g)
        ids_TK = torch.rand(num_tokens, SHAPE.num_experts, generator=g).argsort(1)[:, : SHAPE.top_k].int()
        out_TD, expected_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
        begin_s = time.monotonic()
        self.dispatcher.finish(self.dispatcher.start(layer, x_TD, weights_TK, ids_TK), out_TD)
        taken_s = time.monotonic() - begin_s
        self._oracle.finish(self._oracle.start(layer, x_TD, weights_TK, ids_TK), expected_TD)
        assert torch.equal(out_TD, expected_TD)
        return taken_s

    @property
    def stats(self) -> dict:
        return self.dispatcher.stats()


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
