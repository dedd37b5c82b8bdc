"""RemoteExperts inside vLLM, without an engine: overlap with shared experts, torch.compile, and that stock stays stock.

T tokens, D hidden size, K chosen experts, E experts.
"""

import os
from types import SimpleNamespace

import pytest
import torch

from cluster.fakes import LocalExperts, ToyExperts
from cluster.routing import Shard
from model.plugin import FEED_VARIABLE
from tests.nurseries import run_module

T, D, K, E = 6, 16, 2, 4


class RecordingExperts(LocalExperts):
    """LocalExperts that notes when it is asked to start and to finish."""

    def __init__(self, events: list[str]) -> None:
        super().__init__([(Shard(0, tuple(range(E)), 0, 1), ToyExperts(range(E)).compute)], E)
        self._events = events

    def start(self, layer, x_TD, weights_TK, ids_TK, *, ring=True):
        self._events.append("start" if ring else "start, rung when it waits")
        return super().start(layer, x_TD, weights_TK, ids_TK, ring=ring)

    def finish(self, ticket, out_TD):
        self._events.append("finish")
        super().finish(ticket, out_TD)


class RecordingSharedExperts:
    """What RemoteMoEMethod needs of vLLM's SharedExperts: a call that leaves its output behind."""

    _output_idx = 0

    def __init__(self, events: list[str]) -> None:
        self._output: list[torch.Tensor | None] = [None]

        @torch.library.custom_op("switchyard_test::shared", mutates_args=())
        def shared(x_TD: torch.Tensor) -> torch.Tensor:
            events.append("shared")
            return x_TD * 2

        @shared.register_fake
        def _(x_TD: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(x_TD)

        self._shared = shared

    def __call__(self, x_TD, order):
        self._output[0] = self._shared(x_TD)


@pytest.fixture(scope="module")
def remote():
    """model.remote_experts with its ops registered, in this process, whose models stay stock."""
    from model import remote_experts

    remote_experts._register_ops()
    return remote_experts


@pytest.fixture
def events(remote, monkeypatch) -> list[str]:
    recorded: list[str] = []
    experts = RecordingExperts(recorded)
    link = SimpleNamespace(dispatcher=experts, finish=experts.finish)
    monkeypatch.setattr(remote, "_link", lambda *shape: link)
    monkeypatch.setattr(remote, "_tensor_parallel", lambda: (0, 1))
    return recorded


def make_method(remote):
    method = remote.RemoteMoEMethod.__new__(remote.RemoteMoEMethod)
    method._ordinal, method._max_tokens = 0, 64
    return method


def random_call() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x_TD = torch.randn(T, D, generator=generator)
    weights_TK = torch.rand(T, K, generator=generator)
    ids_TK = torch.randint(0, E, (T, K), generator=generator, dtype=torch.int32)
    return x_TD, weights_TK, ids_TK


def expected(x_TD, weights_TK, ids_TK) -> torch.Tensor:
    out_TD = torch.empty_like(x_TD)
    ToyExperts(range(E)).compute(0, x_TD, weights_TK, ids_TK, out_TD)
    return out_TD


@pytest.mark.parametrize("backend", ["none", "aot_eager", "inductor"])
def test_shared_experts_run_while_the_workers_compute(remote, events, backend):
    method, shared = make_method(remote), RecordingSharedExperts(events)

    def layer(x_TD, weights_TK, ids_TK):
        routed_TD = method.apply(None, x_TD, weights_TK, ids_TK, shared, x_TD)
        return routed_TD + shared._output[0]

    run = layer if backend == "none" else torch.compile(layer, backend=backend, fullgraph=True)
    call = random_call()
    with torch.inference_mode():
        result_TD = run(*call)
    assert events[-3:] == ["start", "shared", "finish"]
    assert torch.allclose(result_TD, expected(*call) + 2 * call[0], atol=1e-6)


@pytest.mark.parametrize("backend", ["none", "inductor"])
def test_without_shared_experts_one_op_does_it(remote, events, backend):
    method = make_method(remote)

    def layer(x_TD, weights_TK, ids_TK):
        return method.apply(None, x_TD, weights_TK, ids_TK, None, None)

    run = layer if backend == "none" else torch.compile(layer, backend=backend, fullgraph=True)
    call = random_call()
    with torch.inference_mode():
        assert torch.allclose(run(*call), expected(*call), atol=1e-6)
    assert events[-2:] == ["start, rung when it waits", "finish"]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_tensor_parallel_rank_dispatches_its_rows_and_leaves_the_others_zero(remote, events, monkeypatch, rank):
    monkeypatch.setattr(remote, "_tensor_parallel", lambda: (rank, 3))
    call = random_call()
    out_TD = torch.ops.switchyard.remote_experts(*call, 0, 64)
    own = slice(rank * 2, rank * 2 + 2)
    wanted_TD = torch.zeros(T, D)
    wanted_TD[own] = expected(*call)[own]
    assert torch.allclose(out_TD, wanted_TD, atol=1e-6)


@pytest.mark.usefixtures("nursery")
@pytest.mark.parametrize("feed", ["", "switchyard-nobody"])
def test_vllm_is_stock_unless_remote_experts_are_asked_for(feed):
    environment = {name: value for name, value in os.environ.items() if name != FEED_VARIABLE}
    if feed:
        environment[FEED_VARIABLE] = feed
    assert run_module("tests.replaced_experts", environment=environment).splitlines()[-1] == str(bool(feed))
