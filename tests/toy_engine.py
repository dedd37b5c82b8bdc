"""A dispatcher among toy workers, whose every answer is checked against an oracle."""

import contextlib
import time

import torch

from cluster.blame import Cause
from cluster.dispatcher import Dispatcher
from cluster.fakes import LocalExperts, ToyExperts, ToyShape
from cluster.placement import partition
from cluster.routing import Replica

SHAPE = ToyShape()
WHOLE = partition(SHAPE.num_layers, SHAPE.num_experts, 1)[0]


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
