"""The dispatcher against real servers over real sockets and shared memory. T tokens, D hidden size, K top_k."""

import contextlib
import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.calls import SENT
from cluster.dispatcher import Dispatcher
from cluster.errors import Closed, ConfigError, ExpertsFailed, ExpertsUnavailable, InvalidCall, InvalidTable
from cluster.fakes import LocalExperts, ProcessWorker, ThreadWorker, ToyExperts, ToyShape, eventually
from cluster.placement import partition
from cluster.routing import ReplicaState, Shard

SHAPE = ToyShape()
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def things() -> Iterator[contextlib.ExitStack]:
    """Whatever a test enters here is closed after it, last first."""
    with contextlib.ExitStack() as stack:
        yield stack


def make_dispatcher(things: contextlib.ExitStack, shape: ToyShape = SHAPE, **options) -> Dispatcher:
    settings = {"engine_id": "engine-0", "secret": shape.secret, "expert_timeout_s": 20.0, **options}
    dispatcher = Dispatcher(
        hidden_size=shape.hidden, top_k=shape.top_k, dtype=shape.dtype, max_tokens=shape.max_tokens, **settings
    )
    things.callback(dispatcher.close)
    things.callback(dispatcher.check_integrity)
    return dispatcher


def make_worker(things: contextlib.ExitStack, shard: Shard, shape: ToyShape = SHAPE, **options) -> ThreadWorker:
    worker = ThreadWorker(shape, shard, **options)
    things.callback(worker.close)
    return worker


def make_process(things: contextlib.ExitStack, shard: Shard, **options) -> ProcessWorker:
    worker = ProcessWorker(SHAPE, shard, **options)
    things.callback(worker.kill)
    return worker


def make_inputs(
    num_tokens: int, shape: ToyShape = SHAPE, seed: int = 0, ids_dtype: torch.dtype = torch.int32
) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, shape.hidden, generator=g).to(shape.dtype)
    weights_TK = torch.rand(num_tokens, shape.top_k, generator=g)
    ids_TK = torch.rand(num_tokens, shape.num_experts, generator=g).argsort(1)[:, : shape.top_k].to(ids_dtype)
    return x_TD, weights_TK, ids_TK


def oracle(shards: tuple[Shard, ...], shape: ToyShape = SHAPE) -> LocalExperts:
    return LocalExperts([(s, ToyExperts(s.experts).compute) for s in shards], shape.num_experts)


def call(experts: Dispatcher | LocalExperts, layer: int, inputs: Inputs) -> torch.Tensor:
    out_TD = torch.full_like(inputs[0], float("nan"))
    experts.finish(experts.start(layer, *inputs), out_TD)
    return out_TD


WHOLE = partition(SHAPE.num_layers, SHAPE.num_experts, 1)


@pytest.mark.parametrize("tcp", [False, True], ids=["shm", "tcp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_results_equal_local_experts_bit_by_bit(things, num_shards, dtype, tcp):
    shape = replace(SHAPE, dtype=dtype)
    shards = partition(shape.num_layers, shape.num_experts, num_shards)
    workers = [make_worker(things, s, shape, tcp=tcp) for s in shards]
    dispatcher = make_dispatcher(things, shape)
    dispatcher.update(shape.table(1, shards, [w.replica(f"r{i}") for i, w in enumerate(workers)]))
    local = oracle(shards, shape)
    lengths = (1, 2, 7, 32, 33, 100, 1, 7)
    for seed, num_tokens in enumerate(lengths):
        inputs = make_inputs(num_tokens, shape, seed, torch.int64 if seed % 2 else torch.int32)
        layer = seed % shape.num_layers
        assert torch.equal(call(dispatcher, layer, inputs), call(local, layer, inputs)), num_tokens
        dispatcher.check_integrity()
    stats = dispatcher.stats()
    assert set(stats["links"].values()) == {"tcp" if tcp else "shm"}
    assert stats["calls"] == len(lengths) and stats["tokens"] == sum(lengths)
    # the fast path was taken exactly where it can be, and nobody got more than one message per chunk of a layer call
    assert stats["whole_calls"] == (sum(n <= shape.max_tokens for n in lengths) if num_shards == 1 else 0)
    assert stats["messages"] <= num_shards * sum(-(-n // shape.max_tokens) for n in lengths)
    assert stats["resent"] == 0 and stats["lost_links"] == 0


def test_shards_may_split_layers_and_order_experts_freely(things):
    shards = (Shard(0, (7, 0, 3), 0, 2), Shard(1, (1, 2, 4, 5, 6), 0, 2), Shard(2, tuple(reversed(range(8))), 2, 3))
    workers = [make_worker(things, s) for s in shards]
    dispatcher = make_dispatcher(things)
    dispatcher.update(SHAPE.table(1, shards, [w.replica(f"r{i}") for i, w in enumerate(workers)]))
    local = oracle(shards)
    for layer in range(3):
        inputs = make_inputs(9, seed=layer)
        assert torch.equal(call(dispatcher, layer, inputs), call(local, layer, inputs))
    with pytest.raises(InvalidCall):
        dispatcher.start(3, *inputs)


def test_choices_of_minus_one_add_nothing_and_untouched_rows_are_zero(things):
    shards = partition(SHAPE.num_layers, SHAPE.num_experts, 2)
    workers = [make_worker(things, s) for s in shards]
    dispatcher = make_dispatcher(things)
    dispatcher.update(SHAPE.table(1, shards, [w.replica(f"r{i}") for i, w in enumerate(workers)]))
    x_TD, weights_TK, ids_TK = make_inputs(4)
    ids_TK[1] = -1
    ids_TK[2, 0] = -1
    out_TD = call(dispatcher, 0, (x_TD, weights_TK, ids_TK))
    assert torch.equal(out_TD, call(oracle(shards), 0, (x_TD, weights_TK, ids_TK)))
    assert not out_TD[1].any()
    ids_TK.fill_(-1)
    whole = make_worker(things, WHOLE[0])
    single = make_dispatcher(things)
    single.update(SHAPE.table(1, WHOLE, [whole.replica("r")]))
    assert not call(single, 1, (*make_inputs(70)[:2], torch.full((70, SHAPE.top_k), -1))).any()
    assert not call(dispatcher, 0, (x_TD, weights_TK, ids_TK)).any()
    assert call(dispatcher, 0, make_inputs(0)).shape == (0, SHAPE.hidden)


def test_non_contiguous_tensors_and_several_open_tickets(things):
    worker = make_worker(things, WHOLE[0])
    dispatcher = make_dispatcher(things)
    dispatcher.update(SHAPE.table(1, WHOLE, [worker.replica("r0")]))
    local = oracle(WHOLE)
    inputs = [make_inputs(5 + i, seed=i) for i in range(5)]  # more than a link has slots
    strided = [(x.t().contiguous().t(), w.t().contiguous().t(), ids.t().contiguous().t()) for x, w, ids in inputs]
    tickets = [dispatcher.start(1, *each) for each in strided]
    for x_TD, _, _ in strided:
        x_TD.fill_(float("nan"))  # everything was copied out by start()
    for ticket, each in zip(reversed(tickets), reversed(inputs), strict=True):
        out_TD = torch.empty_like(each[0].t().contiguous()).t()
        dispatcher.finish(ticket, out_TD)
        assert torch.equal(out_TD, call(local, 1, each))
    assert dispatcher.stats()["open_calls"] == 0


def test_wrong_calls_are_refused_before_anything_is_sent(things):
    worker = make_worker(things, WHOLE[0])
    dispatcher = make_dispatcher(things)
    dispatcher.update(SHAPE.table(1, WHOLE, [worker.replica("r0")]))
    x_TD, weights_TK, ids_TK = make_inputs(3)
    for bad in (
        (x_TD.double(), weights_TK, ids_TK),
        (x_TD[:, 1:], weights_TK, ids_TK),
        (x_TD, weights_TK.half(), ids_TK),
        (x_TD, weights_TK[:2], ids_TK),
        (x_TD, weights_TK, ids_TK.short()),
        (x_TD, weights_TK, ids_TK + 8),
        (x_TD, weights_TK, ids_TK - 9),
    ):
        with pytest.raises(InvalidCall):
            dispatcher.start(0, *bad)
    ticket = dispatcher.start(0, x_TD, weights_TK, ids_TK)
    with pytest.raises(InvalidCall):
        dispatcher.finish(ticket, torch.empty(2, SHAPE.hidden))
    with pytest.raises(InvalidCall):
        dispatcher.finish(ticket, torch.empty_like(x_TD))
    assert eventually(lambda: worker.server.stats()["ok"] == 1)
    assert call(dispatcher, 0, (x_TD, weights_TK, ids_TK)).isfinite().all()
    assert worker.server.stats()["rejected"] == {}


def test_settings_are_checked():
    good = {
        "engine_id": "e",
        "secret": SHAPE.secret,
        "hidden_size": 4,
        "top_k": 1,
        "dtype": torch.float32,
        "max_tokens": 4,
    }
    for bad in ({"secret": b"short"}, {"expert_timeout_s": 0}):
        with pytest.raises(ConfigError):
            Dispatcher(**{**good, **bad})
    with pytest.raises(InvalidCall):
        Dispatcher(**{**good, "dtype": torch.float64})


def test_a_table_takes_effect_at_the_next_call_and_older_ones_are_ignored(things):
    first, second = make_worker(things, WHOLE[0]), make_worker(things, WHOLE[0])
    dispatcher = make_dispatcher(things)
    dispatcher.update(SHAPE.table(5, WHOLE, [first.replica("a")]))
    inputs = make_inputs(2)
    call(dispatcher, 0, inputs)
    dispatcher.update(SHAPE.table(6, WHOLE, [first.replica("a", ReplicaState.DRAINING), second.replica("b")]))
    call(dispatcher, 0, inputs)
    dispatcher.update(SHAPE.table(4, WHOLE, [first.replica("a")]))
    call(dispatcher, 0, inputs)
    assert (first.toy.num_calls, second.toy.num_calls) == (1, 2)
    assert first.server.stats()["sessions"] == 1  # draining: the connection stays for what is open
    dispatcher.update(SHAPE.table(7, WHOLE, [second.replica("b")]))
    call(dispatcher, 0, inputs)
    assert eventually(lambda: first.server.stats()["sessions"] == 0)
    with pytest.raises(InvalidTable):
        dispatcher.update(replace(SHAPE.table(8, WHOLE, []), model_fingerprint="another"))
    with pytest.raises(InvalidTable):
        dispatcher.update(SHAPE.table(8, WHOLE[:0], []))


def test_joining_replicas_are_not_asked(things):
    ready, joining = make_worker(things, WHOLE[0]), make_worker(things, WHOLE[0])
    dispatcher = make_dispatcher(things)
    dispatcher.update(SHAPE.table(1, WHOLE, [joining.replica("j", ReplicaState.JOINING), ready.replica("r")]))
    for _ in range(10):
        call(dispatcher, 0, make_inputs(1))
    assert (ready.toy.num_calls, joining.toy.num_calls) == (10, 0)


def test_replicas_share_the_load(things):
    workers = [make_worker(things, WHOLE[0]) for _ in range(3)]
    dispatcher = make_dispatcher(things)
    dispatcher.update(SHAPE.table(1, WHOLE, [w.replica(f"r{i}") for i, w in enumerate(workers)]))
    assert eventually(
        lambda: len(dispatcher.stats()["links"]) == 3 or not call(dispatcher, 0, make_inputs(1)).isnan().any()
    )
    for _ in range(60):
        call(dispatcher, 0, make_inputs(1))
    assert all(w.toy.num_calls > 5 for w in workers)


@pytest.mark.parametrize("known_before", [True, False], ids=["replica ready", "replica announced later"])
def test_a_killed_worker_is_replaced_in_the_middle_of_a_call(things, known_before):
    victim = make_process(things, WHOLE[0], announce_calls=True, hang_s=60.0)
    dispatcher = make_dispatcher(things)
    dispatcher.update(SHAPE.table(1, WHOLE, [victim.replica("victim")]))
    inputs = make_inputs(6)
    ticket = dispatcher.start(2, *inputs)
    victim.wait_for_call()
    other = make_worker(things, WHOLE[0])
    table = SHAPE.table(2, WHOLE, [victim.replica("victim"), other.replica("other")])
    if known_before:
        dispatcher.update(table)
        victim.kill()
    else:
        victim.kill()
        threading.Timer(
            0.0, lambda: eventually(lambda: dispatcher.stats()["lost_links"] == 1) and dispatcher.update(table)
        ).start()
    out_TD = torch.empty_like(inputs[0])
    dispatcher.finish(ticket, out_TD)
    assert torch.equal(out_TD, call(oracle(WHOLE), 2, inputs))
    stats = dispatcher.stats()
    assert stats["lost_links"] == 1 and stats["resent"] == 1 and stats["rows_failed"] == 0
    assert other.toy.num_calls == 1


def test_an_answer_written_before_the_worker_died_still_counts(things):
    worker = make_process(things, WHOLE[0])
    dispatcher = make_dispatcher(things, expert_timeout_s=5.0)
    dispatcher.update(SHAPE.table(1, WHOLE, [worker.replica("r")]))
    inputs = make_inputs(2)
    ticket = dispatcher.start(0, *inputs)
    part = dispatcher._calls[ticket].parts[0]
    assert eventually(lambda: part.link.words[part.slot.word + 8] == part.slot.sequence)
    worker.kill()
    out_TD = torch.empty_like(inputs[0])
    dispatcher.finish(ticket, out_TD)
    assert torch.equal(out_TD, call(oracle(WHOLE), 0, inputs))


def test_no_table_and_no_replica_wait_then_raise(things):
    dispatcher = make_dispatcher(things, expert_timeout_s=0.15)
    inputs = make_inputs(2)
    with pytest.raises(ExpertsUnavailable):
        dispatcher.start(0, *inputs)
    dispatcher.update(SHAPE.table(1, WHOLE, []))
    with pytest.raises(ExpertsUnavailable, match="no replica is there") as caught:
        call(dispatcher, 0, inputs)
    assert caught.value.http_status == 503 and caught.value.retry_after_s > 0
    worker = make_worker(things, WHOLE[0])
    dispatcher.update(SHAPE.table(2, WHOLE, [worker.replica("r")]))
    assert torch.equal(call(dispatcher, 0, inputs), call(oracle(WHOLE), 0, inputs))


def test_a_call_that_may_wait_on_reports_every_timeout_and_is_answered_in_the_end(things):
    reports: list[str] = []
    twice = threading.Event()

    def on_timeout(why):
        reports.append(why)
        if len(reports) == 2:
            twice.set()

    dispatcher = make_dispatcher(things, expert_timeout_s=0.1, on_timeout=on_timeout)
    dispatcher.update(SHAPE.table(1, WHOLE, []))
    worker = make_worker(things, WHOLE[0])

    def bring_back():
        assert twice.wait(10)
        dispatcher.update(SHAPE.table(2, WHOLE, [worker.replica("r")]))

    helper = threading.Thread(target=bring_back)
    helper.start()
    inputs = make_inputs(2)
    assert torch.equal(call(dispatcher, 0, inputs), call(oracle(WHOLE), 0, inputs))
    helper.join()
    assert all("no replica is there" in report for report in reports)
    assert dispatcher.stats()["timeouts"] == len(reports) >= 2 and dispatcher.stats()["rows_failed"] == 0
    dispatcher.check_integrity()


def test_a_call_whose_shard_disappears_is_split_anew(things):
    halves = partition(SHAPE.num_layers, SHAPE.num_experts, 2)
    workers = [make_worker(things, s) for s in halves]
    for old in (WHOLE, partition(SHAPE.num_layers, SHAPE.num_experts, 4)):
        dispatcher = make_dispatcher(things)
        dispatcher.update(SHAPE.table(1, old, []))
        inputs = make_inputs(70)
        ticket = dispatcher.start(1, *inputs)
        dispatcher.update(SHAPE.table(2, halves, [w.replica(f"r{i}") for i, w in enumerate(workers)]))
        out_TD = torch.empty_like(inputs[0])
        dispatcher.finish(ticket, out_TD)
        torch.testing.assert_close(out_TD, call(oracle(WHOLE), 1, inputs))
        dispatcher.check_integrity()


class Gate:
    """A ComputeFn that announces each call and waits to be let through."""

    def __init__(self) -> None:
        self.toy = ToyExperts(range(SHAPE.num_experts))
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.lengths: list[int] = []

    def __call__(self, layer, x_TD, weights_TK, ids_TK, out_TD, complete):
        self.lengths.append(len(x_TD))
        self.entered.release()
        assert self.open.wait(30)
        self.toy.compute(layer, x_TD, weights_TK, ids_TK, out_TD)


def test_waiting_calls_of_one_layer_become_one_kernel_call(things):
    gate = Gate()
    worker = make_worker(things, WHOLE[0], compute=gate)
    tcp = replace(worker.replica("r"), endpoint=replace(worker.server.endpoint, host_id="elsewhere"))
    engines = [make_dispatcher(things, engine_id=f"engine-{i}") for i in range(4)]
    for i, engine in enumerate(engines):
        engine.update(SHAPE.table(1, WHOLE, [tcp if i == 2 else worker.replica("r")]))
    inputs = [make_inputs(n, seed=n) for n in (3, 4, 5, 6)]
    tickets = [engines[0].start(0, *inputs[0])]
    assert gate.entered.acquire(timeout=10)  # the kernel is busy; now three engines ring, one of them for another layer
    layers = (0, 1, 1, 2)
    tickets += [engines[i].start(layers[i], *inputs[i]) for i in (1, 2, 3)]
    gate.open.set()
    for i, engine in enumerate(engines):
        out_TD = torch.empty_like(inputs[i][0])
        engine.finish(tickets[i], out_TD)
        assert torch.equal(out_TD, call(oracle(WHOLE), layers[i], inputs[i]))
    assert sorted(gate.lengths) == [3, 6, 9]
    assert worker.server.stats()["batched_messages"] == 2


def test_batches_do_not_exceed_max_tokens(things):
    gate = Gate()
    worker = make_worker(things, WHOLE[0], compute=gate)
    engines = [make_dispatcher(things, engine_id=f"engine-{i}") for i in range(4)]
    for engine in engines:
        engine.update(SHAPE.table(1, WHOLE, [worker.replica("r")]))
    inputs = [make_inputs(n, seed=n) for n in (1, 20, 12, 20)]
    tickets = [engines[0].start(0, *inputs[0])]
    assert gate.entered.acquire(timeout=10)
    tickets += [engines[i].start(0, *inputs[i]) for i in (1, 2, 3)]
    gate.open.set()
    for i, engine in enumerate(engines):
        out_TD = torch.empty_like(inputs[i][0])
        engine.finish(tickets[i], out_TD)
        assert torch.equal(out_TD, call(oracle(WHOLE), 0, inputs[i]))
    assert sum(gate.lengths) == 53 and max(gate.lengths) == 32


def test_a_timeout_fails_the_call_and_its_late_reply_is_dropped(things):
    gate = Gate()
    worker = make_worker(things, WHOLE[0], compute=gate)
    dispatcher = make_dispatcher(things, expert_timeout_s=0.2)
    dispatcher.update(SHAPE.table(1, WHOLE, [worker.replica("r")]))
    with pytest.raises(ExpertsUnavailable, match="asked \\['r'\\]"):
        call(dispatcher, 0, make_inputs(3))
    dispatcher.check_integrity()
    gate.open.set()
    inputs = make_inputs(4, seed=1)
    assert torch.equal(call(dispatcher, 0, inputs), call(oracle(WHOLE), 0, inputs))
    assert eventually(lambda: not call(dispatcher, 0, inputs).isnan().any() and dispatcher.stats()["late_replies"] == 1)
    stats = dispatcher.stats()
    assert stats["timeouts"] == 1 and stats["rows_failed"] == 3


def test_a_slow_replica_is_overtaken_and_a_spent_budget_is_not_computed(things):
    gate = Gate()
    slow, fast = make_worker(things, WHOLE[0], compute=gate), make_worker(things, WHOLE[0])
    dispatcher = make_dispatcher(things, expert_timeout_s=10.0, attempt_timeout_s=0.05)
    dispatcher.update(SHAPE.table(1, WHOLE, [slow.replica("slow")]))
    inputs = [make_inputs(3, seed=i) for i in range(2)]
    tickets = [dispatcher.start(0, *inputs[0])]
    assert gate.entered.acquire(timeout=10)
    tickets.append(dispatcher.start(0, *inputs[1]))
    dispatcher.update(SHAPE.table(2, WHOLE, [slow.replica("slow"), fast.replica("fast")]))
    for ticket, each in zip(tickets, inputs, strict=True):
        out_TD = torch.empty_like(each[0])
        dispatcher.finish(ticket, out_TD)
        assert torch.equal(out_TD, call(oracle(WHOLE), 0, each))
    assert fast.toy.num_calls == 2
    gate.open.set()
    assert eventually(lambda: slow.server.stats()["expired"] == 1)  # the second was never computed
    assert gate.lengths == [3]


def test_an_expired_call_is_asked_again_where_nobody_else_is(things):
    gate = Gate()
    worker = make_worker(things, WHOLE[0], compute=gate)
    blocker = make_dispatcher(things, engine_id="blocker")
    dispatcher = make_dispatcher(things, expert_timeout_s=20.0, attempt_timeout_s=0.02)
    for each in (blocker, dispatcher):
        each.update(SHAPE.table(1, WHOLE, [worker.replica("r")]))
    inputs = make_inputs(2)
    blocking = blocker.start(0, *inputs)
    assert gate.entered.acquire(timeout=10)
    ticket = dispatcher.start(1, *inputs)
    threading.Timer(0.1, gate.open.set).start()  # longer than the attempt's budget: the worker will not compute it
    out_TD = torch.empty_like(inputs[0])
    dispatcher.finish(ticket, out_TD)
    assert torch.equal(out_TD, call(oracle(WHOLE), 1, inputs))
    assert dispatcher.stats()["expired"] >= 1
    blocker.finish(blocking, out_TD)


def test_a_draining_worker_hands_its_calls_to_another(things):
    leaving, staying = make_worker(things, WHOLE[0]), make_worker(things, WHOLE[0])
    dispatcher = make_dispatcher(things)
    dispatcher.update(SHAPE.table(1, WHOLE, [leaving.replica("leaving")]))
    call(dispatcher, 0, make_inputs(1))
    leaving.server.drain()
    assert leaving.server.wait_drained(5)
    dispatcher.update(SHAPE.table(2, WHOLE, [leaving.replica("leaving"), staying.replica("staying")]))
    inputs = make_inputs(4)
    assert eventually(
        lambda: (
            torch.equal(call(dispatcher, 0, inputs), call(oracle(WHOLE), 0, inputs))
            and dispatcher.stats()["refused_draining"] > 0
        )
    )
    assert leaving.toy.num_calls == 1


def test_a_kernel_that_raises_fails_over_and_then_fails(things):
    def broken(*_):
        raise ValueError("no such expert today")

    bad, good = make_worker(things, WHOLE[0], compute=broken), make_worker(things, WHOLE[0])
    dispatcher = make_dispatcher(things)
    dispatcher.update(SHAPE.table(1, WHOLE, [bad.replica("bad")]))
    with pytest.raises(ExpertsFailed, match="bad: ValueError: no such expert today"):
        call(dispatcher, 0, make_inputs(2))
    dispatcher.update(SHAPE.table(2, WHOLE, [bad.replica("bad"), good.replica("good")]))
    inputs = make_inputs(2)
    for _ in range(20):
        assert torch.equal(call(dispatcher, 0, inputs), call(oracle(WHOLE), 0, inputs))
    assert bad.server.stats()["error"] == dispatcher.stats()["errors"] == 2, "once alone, once before it was suspected"
    assert dispatcher.stats()["suspected"] == ["bad"]


def test_a_refusal_is_named_in_the_error(things):
    worker = make_worker(things, WHOLE[0], model_fingerprint="another model")
    dispatcher = make_dispatcher(things, expert_timeout_s=0.1)
    dispatcher.update(SHAPE.table(1, WHOLE, [worker.replica("r")]))
    with pytest.raises(ExpertsUnavailable, match="holds model 'another model'"):
        call(dispatcher, 0, make_inputs(1))
    assert worker.server.stats()["refused"] == 1


def test_the_wrong_secret_gets_nowhere(things):
    worker = make_worker(things, WHOLE[0])
    dispatcher = make_dispatcher(things, secret=b"not the cluster's secret", expert_timeout_s=0.1)
    dispatcher.update(SHAPE.table(1, WHOLE, [worker.replica("r")]))
    with pytest.raises(ExpertsUnavailable):
        call(dispatcher, 0, make_inputs(1))
    assert worker.server.stats()["rejected"].keys() == {"wrong_secret"}


def test_calls_leave_no_work_for_the_garbage_collector(things):
    shards = partition(SHAPE.num_layers, SHAPE.num_experts, 2)
    workers = [make_process(things, s) for s in shards]
    dispatcher = make_dispatcher(things)
    dispatcher.update(SHAPE.table(1, shards, [w.replica(f"r{i}") for i, w in enumerate(workers)]))
    inputs = make_inputs(5)
    call(dispatcher, 0, inputs)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            call(dispatcher, 0, inputs)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_close_leaves_nothing_behind():
    def num_fds() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    def one_life(tcp: bool) -> None:
        with contextlib.ExitStack() as things:
            shards = partition(SHAPE.num_layers, SHAPE.num_experts, 2)
            workers = [make_worker(things, s, tcp=tcp) for s in shards]
            dispatcher = make_dispatcher(things)
            dispatcher.update(SHAPE.table(1, shards, [w.replica(f"r{i}") for i, w in enumerate(workers)]))
            call(dispatcher, 0, make_inputs(5))
            open_ticket = dispatcher.start(0, *make_inputs(5))
            assert dispatcher._calls[open_ticket].parts[0].state == SENT
        with pytest.raises((Closed, InvalidCall)):
            dispatcher.finish(open_ticket, torch.empty(5, SHAPE.hidden))
        with pytest.raises(Closed):
            dispatcher.update(SHAPE.table(9, shards, []))

    one_life(False)
    before = num_fds()
    for tcp in (False, True, False):
        one_life(tcp)
    assert num_fds() == before
    assert "memfd:switchyard" not in Path("/proc/self/maps").read_text()
