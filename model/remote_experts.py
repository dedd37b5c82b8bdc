"""The engine's side of an MoE layer: vLLM's RoutedExperts without weights, whose experts answer from expert workers.

vLLM's RoutedExperts is a PluggableLayer, so registering a replacement under its name changes every model built with
FusedMoEFactory. The gate, the shared experts and the all-reduce stay vLLM's. The remote call is a pair of opaque custom
ops, which torch.compile steps over; shared experts run between them, while the workers compute.

Shapes: T tokens, D hidden, K chosen experts per token.
"""

import functools
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts, SharedExpertsOrder
from vllm.utils.torch_utils import direct_register_custom_op

from cluster.blame import Cause
from cluster.dispatcher import Dispatcher
from cluster.errors import IntegrityError
from cluster.feed import TableSubscriber
from model import sleeping_queue
from model.layer_spans import LayerSpans
from model.plugin import FEED_VARIABLE
from model.replacement import replace_routed_experts

logger = init_logger(__name__)

_METRICS_EVERY_S = 1.0


class EngineLink:
    """This process's dispatcher and the feed that keeps its routing table current; made at the first layer call."""

    def __init__(self, *, hidden_size: int, top_k: int, dtype: torch.dtype, max_tokens: int):
        environment = os.environ
        self._is_stalled = False
        self.subscriber: TableSubscriber | None = None
        self.dispatcher = Dispatcher(
            engine_id=environment["SWITCHYARD_ENGINE_ID"],
            secret=Path(environment["SWITCHYARD_SECRET_FILE"]).read_bytes,  # changes while the engine runs
            hidden_size=hidden_size,
            top_k=top_k,
            dtype=dtype,
            max_tokens=max_tokens,
            expert_timeout_s=float(environment["SWITCHYARD_EXPERT_TIMEOUT_S"]),
            on_timeout=self._on_timeout,
            on_accused=self._on_accused,
        )
        feed_secret = Path(environment["SWITCHYARD_FEED_SECRET_FILE"]).read_bytes()
        self.subscriber = TableSubscriber(environment[FEED_VARIABLE], feed_secret, self.dispatcher.update)
        self.subscriber.wait_first(float(environment["SWITCHYARD_START_TIMEOUT_S"]))
        if environment["SWITCHYARD_METRICS"] == "1":
            threading.Thread(target=self._publish_metrics, name="switchyard-metrics", daemon=True).start()

    def _publish_metrics(self) -> None:
        """Once a second, from a thread of its own: the step's thread counts and does nothing else for metrics."""
        assert self.subscriber is not None
        while True:
            self.subscriber.publish(self.dispatcher.metrics())
            time.sleep(_METRICS_EVERY_S)

    def _on_timeout(self, why: str) -> None:
        """To vLLM an error in a forward step is the engine's end. So the step waits on, and HTTP answers meanwhile."""
        logger.warning("Switchyard: no experts: %s", why)
        self._report_stalled(True)

    def _report_stalled(self, is_stalled: bool) -> None:
        self._is_stalled = is_stalled
        if self.subscriber is not None:
            self.subscriber.report(is_stalled)

    def _on_accused(self, replica_id: str, cause: Cause) -> None:
        logger.warning("Switchyard: worker %s is suspected: %s", replica_id, cause.value)
        if self.subscriber is not None:  # it is being made, while the first table is adopted in its thread
            self.subscriber.accuse(replica_id, cause)

    def finish(self, ticket: int, out_TD: torch.Tensor) -> None:
        """Dispatcher.finish(), and the news that a stall is over."""
        self.dispatcher.finish(ticket, out_TD)
        if self._is_stalled:
            self._report_stalled(False)


_link_made: EngineLink | None = None
_spans: LayerSpans | None = None


def _link(hidden_size: int, top_k: int, dtype: torch.dtype, max_tokens: int) -> EngineLink:
    global _link_made
    if _link_made is None:
        _link_made = EngineLink(hidden_size=hidden_size, top_k=top_k, dtype=dtype, max_tokens=max_tokens)
    return _link_made


class LayerCallStats:
    """Mixed into vLLM's worker (worker_extension_cls), so that collective_rpc can ask for the dispatcher's counters."""

    def layer_call_stats(self) -> dict[str, int]:
        """Dispatcher.stats() of this rank, integers only; {} before the first layer call."""
        if _link_made is None:
            return {}
        return {name: value for name, value in _link_made.dispatcher.stats().items() if isinstance(value, int)}

    def trace_layer_calls(self) -> None:
        """From now on layer calls of traced requests have spans."""
        global _spans
        runner = self.model_runner  # type: ignore[attr-defined]  # vLLM's worker has it
        execute = runner.execute_model
        in_step: list[str] = []

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            in_step[:] = scheduler_output.num_scheduled_tokens  # vLLM's two runners keep a batch in different places
            return execute(scheduler_output, *args, **kwargs)

        runner.execute_model = execute_model
        _spans = LayerSpans(lambda: in_step)

    def layer_call_fault(self) -> str:
        """What Dispatcher.check_integrity() finds on this rank; empty when all is well."""
        try:
            if _link_made is not None:
                _link_made.dispatcher.check_integrity()
        except IntegrityError as error:
            return str(error)
        return ""


class RemoteMoEMethod(FusedMoEMethodBase):
    """A quantisation method with no weights: apply() sends the tokens to the expert workers."""

    def __init__(self, moe: FusedMoEConfig):
        super().__init__(moe)
        vllm_config = get_current_vllm_config()
        # vLLM appends to this list after it has built each MoE layer, in model order.
        self._ordinal = len(vllm_config.compilation_config.static_all_moe_layers)
        self._max_tokens = vllm_config.scheduler_config.max_num_batched_tokens

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        return True

    @property
    def is_monolithic(self) -> bool:
        return False

    @property
    def topk_indices_dtype(self) -> torch.dtype | None:
        return torch.int32

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra):
        """Creates none: that is the point."""

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Weighted sum over each token's K experts. x [T, D], topk_weights [T, K], topk_ids [T, K] -> [T, D]."""
        weights_TK = topk_weights.to(torch.float32)
        if shared_experts is None:
            return torch.ops.switchyard.remote_experts(x, weights_TK, topk_ids, self._ordinal, self._max_tokens)
        ticket = torch.ops.switchyard.remote_start(x, weights_TK, topk_ids, self._ordinal, self._max_tokens)
        shared_experts(shared_experts_input, order=SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
        # The shared output is named as an input so that no compiler moves the waiting before the overlapped work.
        shared_TD = shared_experts._output[shared_experts._output_idx]
        return torch.ops.switchyard.remote_finish(ticket, x, shared_TD, topk_ids.shape[1], self._max_tokens)


class _RemoteMixin:
    """Turns a RoutedExperts class into one that holds and loads nothing."""

    def _get_quant_method(self, prefix, quant_config, moe_config) -> FusedMoEMethodBase:
        return RemoteMoEMethod(moe_config)

    def load_weights(self, weights):
        """Drops whatever it is given: expert weights belong to the workers."""
        for _ in weights:
            pass
        return iter(())


def _own_rows(num_tokens: int) -> slice:
    """The token rows this tensor-parallel rank dispatches; vLLM's all-reduce adds the ranks' outputs."""
    rank, size = _tensor_parallel()
    return slice(num_tokens * rank // size, num_tokens * (rank + 1) // size)


@functools.cache
def _tensor_parallel() -> tuple[int, int]:
    from vllm.distributed import get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def _start(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, layer: int, max_tokens: int, ring: bool = True
) -> int:
    dispatcher = _link(x_TD.shape[1], ids_TK.shape[1], x_TD.dtype, max_tokens).dispatcher
    if _tensor_parallel()[1] > 1:
        rows = _own_rows(x_TD.shape[0])
        x_TD, weights_TK, ids_TK = x_TD[rows], weights_TK[rows], ids_TK[rows]
    if _spans is not None:
        _spans.begin(layer, x_TD.shape[0], dispatcher.counters)
    return dispatcher.start(layer, x_TD, weights_TK, ids_TK, ring=ring)


def _finish(ticket: int, x_TD: torch.Tensor, top_k: int, max_tokens: int) -> torch.Tensor:
    link = _link(x_TD.shape[1], top_k, x_TD.dtype, max_tokens)
    if _tensor_parallel()[1] > 1:
        out_TD = torch.zeros_like(x_TD)
        link.finish(ticket, out_TD[_own_rows(x_TD.shape[0])])
    else:
        out_TD = torch.empty_like(x_TD)
        link.finish(ticket, out_TD)
    if _spans is not None:
        _spans.end(link.dispatcher.counters)
    return out_TD


def _remote_experts(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, layer: int, max_tokens: int
) -> torch.Tensor:
    ticket = _start(x_TD, weights_TK, ids_TK, layer, max_tokens, ring=False)
    return _finish(ticket, x_TD, ids_TK.shape[1], max_tokens)


def _remote_experts_fake(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, layer: int, max_tokens: int
) -> torch.Tensor:
    return torch.empty_like(x_TD)


def _remote_start(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, layer: int, max_tokens: int
) -> torch.Tensor:
    return torch.tensor([_start(x_TD, weights_TK, ids_TK, layer, max_tokens)], dtype=torch.int64, device="cpu")


def _remote_start_fake(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, layer: int, max_tokens: int
) -> torch.Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


def _remote_finish(
    ticket: torch.Tensor, x_TD: torch.Tensor, shared_TD: torch.Tensor, top_k: int, max_tokens: int
) -> torch.Tensor:
    return _finish(int(ticket), x_TD, top_k, max_tokens)


def _remote_finish_fake(
    ticket: torch.Tensor, x_TD: torch.Tensor, shared_TD: torch.Tensor, top_k: int, max_tokens: int
) -> torch.Tensor:
    return torch.empty_like(x_TD)


_library = torch.library.Library("switchyard", "FRAGMENT")


def _register_ops() -> None:
    for name, implementation, fake in (
        ("remote_experts", _remote_experts, _remote_experts_fake),
        ("remote_start", _remote_start, _remote_start_fake),
        ("remote_finish", _remote_finish, _remote_finish_fake),
    ):
        direct_register_custom_op(op_name=name, op_func=implementation, fake_impl=fake, target_lib=_library)


@functools.cache
def register() -> None:
    """Replace every RoutedExperts class in models that this process will build. Idempotent."""
    _register_ops()
    sleeping_queue.register()
    replace_routed_experts(_RemoteMixin)
    logger.info("Switchyard: routed experts are remote; this engine holds no expert weights")
