"""The worker's side: a shard's experts in memory, computed by vLLM's own kernels.

The model is built by vLLM on the meta device, where it costs nothing. Only the RoutedExperts of the hosted layers get
memory, and only for the hosted experts. To vLLM such a layer looks like one with few experts, numbered from 0, so no
kernel needs an expert map and every quantisation that vLLM loads works here.

Shapes: T tokens, D hidden, K chosen experts per token, P (token, expert) pairs.
"""

import contextlib
import copy
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

from cluster.combine import Accumulator
from cluster.errors import CheckpointError
from cluster.routing import Shard
from model import exact_float32, host_experts, integer_experts
from model.expert_weights import hosted_integers, hosted_weights
from model.host_experts import HostMethod, host_kernel
from model.integer_experts import IntegerExperts
from model.moe_spec import MoeSpec, inspect_checkpoint, weight_files
from model.partial_loading import PartialLoader
from model.quantised import engine_args
from model.replacement import replace_routed_experts

Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Hosting:
    """What the RoutedExperts under construction shall hold."""

    shard: Shard
    device: torch.device
    integers: bool = False  # stored as integers, to be computed as such where there is a kernel


_hosting: _Hosting | None = None


class _HostedMixin:
    """Turns a RoutedExperts class into one that holds only the shard's experts, numbered from 0, in real memory."""

    def __init__(self, layer_name, params_dtype, moe_config, quant_config, expert_map_manager, **kwargs):
        assert _hosting is not None, "HostedExperts.load() builds these layers"
        ordinal = len(get_current_vllm_config().compilation_config.static_all_moe_layers)
        self.ordinal = ordinal
        self.is_hosted = _hosting.shard.first_layer <= ordinal < _hosting.shard.end_layer
        num_local = len(_hosting.shard.experts)
        moe_config, expert_map_manager = copy.copy(moe_config), copy.copy(expert_map_manager)
        moe_config.num_experts = moe_config.num_local_experts = moe_config.num_logical_experts = num_local
        expert_map_manager.global_num_experts = expert_map_manager._local_num_experts = num_local
        expert_map_manager._expert_map = expert_map_manager._expert_mask = None
        device = _hosting.device if self.is_hosted else torch.device("meta")
        with device:
            super().__init__(
                layer_name, params_dtype, moe_config, quant_config, expert_map_manager=expert_map_manager, **kwargs
            )

    def _get_quant_method(self, prefix, quant_config, moe_config) -> FusedMoEMethodBase:
        assert _hosting is not None, "HostedExperts.load() builds these layers"
        activation = moe_config.activation.value
        weighs_inputs = self.apply_router_weight_on_input  # type: ignore[attr-defined]
        is_plain = not (moe_config.has_bias or weighs_inputs)
        if _hosting.integers and is_plain and integer_experts.can_compute(activation, moe_config.in_dtype):
            return _IntegerMethod(moe_config)
        if _hosting.device.type == "cpu" and not current_platform.is_cpu():
            if quant_config is None and not weighs_inputs and host_experts.can_compute(activation):
                return HostMethod(moe_config)
            raise CheckpointError(
                f"{activation if quant_config is None else quant_config.get_name()}: this installation, vLLM's build "
                "for GPUs, cannot compute such experts in host memory. Give their workers GPUs: worker.num_gpus."
            )
        return super()._get_quant_method(prefix, quant_config, moe_config)  # type: ignore[misc]

    def load_weights(self, weights):
        return super().load_weights(weights) if self.is_hosted else iter(())


class _IntegerMethod(FusedMoEMethodBase):
    """To vLLM a method without weights: the layer's experts are IntegerExperts, which are called directly."""

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra):
        """Takes no memory."""

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input) -> torch.Tensor:
        raise NotImplementedError("a worker's layers are not called through vLLM")


def import_kernels() -> None:
    """Load the libraries with vLLM's kernels."""
    torch.cpu._init_amx()
    current_platform.import_kernels()


def warm_up(model: str, dtype: str, in_host_memory: bool) -> None:
    """Do everything that load() does for any shard of `model`, but for the weights: imports, kernels, vLLM's config.

    For a spare, to which each of these seconds is one that requests wait for.
    """
    import_kernels()
    device = _device(in_host_memory)
    spec = inspect_checkpoint(model, dtype)
    config = _vllm_config(model, dtype, spec, 1, device)
    with set_current_vllm_config(config), _single_process_groups():
        _build_on_meta(config, _hosting_of(Shard(0, (0,), 0, 0), spec, device))


def _device(in_host_memory: bool) -> torch.device:
    """Where experts live; what belongs to the device in this process is made ready for them."""
    if in_host_memory or current_platform.is_cpu():
        os.environ["VLLM_DISABLE_SHARED_EXPERTS_STREAM"] = "1"  # on a GPU, to vLLM, which this process shall not touch
        return torch.device("cpu")
    exact_float32.ask_for()
    device = torch.device(current_platform.device_type, 0)
    current_platform.set_device(device)
    if not is_workspace_manager_initialized():
        init_workspace_manager(device)
    return device


def _hosting_of(shard: Shard, spec: MoeSpec | None, device: torch.device) -> _Hosting:
    return _Hosting(shard, device, spec is not None and spec.stored is not None and device.type == "cpu")


def _vllm_config(model: str, dtype: str, spec: MoeSpec | None, max_tokens: int, device: torch.device) -> VllmConfig:
    """Of integers that this device has no kernel for, vLLM shall not know: their plain weights are loaded."""
    as_plain = device.type == "cpu" or (spec is not None and spec.dtype == torch.float32)
    arguments = EngineArgs(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_num_batched_tokens=max_tokens,
        **(engine_args(model) if as_plain else {}),
    )
    return arguments.create_engine_config()


@functools.cache
def _replace_once() -> None:
    replace_routed_experts(_HostedMixin)


def _build_on_meta(config: VllmConfig, hosting: _Hosting) -> torch.nn.Module:
    """The model with its weights on the meta device but for the hosted experts."""
    global _hosting
    _hosting = hosting
    try:
        _replace_once()
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            return initialize_model(config)
    finally:
        _hosting = None


class HostedExperts:
    """The experts of one shard, ready to compute. One per process: it owns the process's vLLM state.

    `layers` maps the MoE-layer ordinal to vLLM's layer, `integers` to the experts of one whose weights are computed as
    they are stored; `memory_bytes` is what all of them take, `device` where they are, in words: "cpu", or "cuda:0" with
    the card's name.
    """

    def __init__(
        self, spec: MoeSpec, shard: Shard, layers: dict[int, RoutedExperts], integers: dict[int, IntegerExperts]
    ):
        self.spec = spec
        self.shard = shard
        self.layers = layers
        parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
        self.device = _describe(next((p.device for p in parameters if not p.is_meta), torch.device("cpu")))
        self.memory_bytes = sum(p.nbytes for p in parameters) + sum(e.memory_bytes for e in integers.values())
        self._sum = Accumulator(spec.hidden_size, max_tokens=1)
        # Kernels that know an expert that is elsewhere.
        self._tolerant = {ordinal: experts.ready() for ordinal, experts in integers.items()} | {
            ordinal: host_kernel(layer)
            for ordinal, layer in layers.items()
            if isinstance(layer.quant_method, HostMethod)
        }
        self._direct = {ordinal: _direct_kernel(layer) for ordinal, layer in layers.items()}

    @classmethod
    def load(
        cls,
        model: str,
        dtype: str,
        shard: Shard,
        *,
        num_threads: int,
        max_tokens: int,
        progress: Progress,
        in_host_memory: bool = False,
    ) -> "HostedExperts":
        """Read the shard's experts of checkpoint folder `model` and prepare vLLM's kernels for them.

        num_threads is the kernels' thread count; max_tokens the largest call; in_host_memory leaves this process's GPU,
        if it has one, alone. Raises CheckpointError when the checkpoint has no such experts, when vLLM's kernel for it
        cannot be separated from the gate, or when there is none for host memory.
        """
        spec = inspect_checkpoint(model, dtype)
        if spec is None:
            raise CheckpointError(f"{model} has no routed experts: a dense model needs no expert workers")
        import_kernels()
        progress("building the model's skeleton")
        device = _device(in_host_memory)
        config = _vllm_config(model, dtype, spec, max_tokens, device)
        with set_current_vllm_config(config), _single_process_groups():
            skeleton = _build_on_meta(config, _hosting_of(shard, spec, device))
            progress(f"reading {len(shard.experts)} of {spec.num_experts} experts per layer")
            routed = [module for module in skeleton.modules() if isinstance(module, RoutedExperts)]
            layers = {module.ordinal: module for module in routed if module.is_hosted}
            if all(isinstance(layer.quant_method, _IntegerMethod) for layer in layers.values()):
                return cls(spec, shard, layers, _load_integers(Path(model), layers, spec, shard, num_threads))
            _load_layers(config, skeleton, spec, shard, layers.values())
        return cls(spec, shard, layers, {})

    def compute(
        self,
        layer: int,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        out_TD: torch.Tensor,
        complete: bool,
    ) -> None:
        """Write each token's weighted sum over the experts it chose here into out_TD.

        x and out have the spec's dtype, weights are float32, ids int32 local expert numbers or -1 for an expert that
        lives elsewhere; `complete` says that there is none. Tensors are on the CPU; they are moved when the experts are
        on a GPU. Call it in torch's inference mode.
        """
        if (tolerant := self._tolerant.get(layer)) is not None:
            tolerant(out_TD, x_TD, weights_TK, ids_TK)
        elif complete:
            self._forward(layer, x_TD, weights_TK, ids_TK, out_TD)
        else:
            self._forward_pairs(layer, x_TD, weights_TK, ids_TK, ids_TK.numpy() >= 0, out_TD)

    def _forward_pairs(self, layer, x_TD, weights_TK, ids_TK, here_TK: np.ndarray, out_TD) -> None:
        """Kernels know no "elsewhere": run the pairs that are here as tokens of their own and add them up per token.

        Taken column by column, so that within a column every token is named once. numpy, because torch's gathers and
        index_add_ wake the thread pool for any size.
        """
        columns_P, rows_P = here_TK.T.nonzero()
        pairs_PD = torch.empty((len(rows_P), x_TD.shape[1]), dtype=out_TD.dtype)
        np.take(_bits(x_TD), rows_P, axis=0, out=_bits(pairs_PD), mode="clip")
        weights_P1 = torch.from_numpy(weights_TK.numpy()[rows_P, columns_P].reshape(-1, 1))
        ids_P1 = torch.from_numpy(ids_TK.numpy()[rows_P, columns_P].reshape(-1, 1))
        partial_PD = torch.empty_like(pairs_PD)
        if len(rows_P):
            self._forward(layer, pairs_PD, weights_P1, ids_P1, partial_PD)
        self._sum.begin(len(out_TD))
        bounds = np.searchsorted(columns_P, np.arange(here_TK.shape[1] + 1))
        for first, end in pairwise(bounds):
            if first < end:
                self._sum.add(partial_PD[first:end], rows_P[first:end])
        self._sum.finish(out_TD)

    def _forward(self, layer, x_TD, weights_TK, ids_TK, out_TD) -> None:
        direct = self._direct[layer]
        if direct is not None:
            direct(out_TD, x_TD, weights_TK, ids_TK)
            return
        experts = self.layers[layer]
        device = next(experts.parameters()).device
        padding = experts.hidden_size - x_TD.shape[1]
        x_TD = torch.nn.functional.pad(x_TD.to(device), (0, padding)) if padding else x_TD.to(device)
        result_TD = experts.forward_modular(x_TD, weights_TK.to(device), ids_TK.to(device))
        out_TD.copy_(result_TD[:, : out_TD.shape[1]])


def _describe(device: torch.device) -> str:
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _bits(x_TD: torch.Tensor) -> np.ndarray:
    """The tensor's memory as a numpy array of elements of the same size; numpy has no bfloat16."""
    return x_TD.numpy() if x_TD.dtype == torch.float32 else x_TD.view(torch.int16).numpy()


def _direct_kernel(layer: RoutedExperts) -> Callable[..., None] | None:
    """vLLM's unquantised CPU kernel called straight into `out`, saving a copy and its modular wrapper; else None."""
    kernel = layer.quant_method.moe_kernel
    experts = kernel.fused_experts if kernel is not None else None
    if not isinstance(experts, CPUUnquantizedExperts) or layer.apply_router_weight_on_input:
        return None

    # Looked up once: attributes of a module go through Python, on caches that the last kernel has just emptied.
    w13_weight, w2_weight, activation = layer.w13_weight, layer.w2_weight, layer.activation
    num_experts = layer.global_num_experts

    def run(out_TD, x_TD, weights_TK, ids_TK) -> None:
        experts.apply(
            out_TD,
            x_TD,
            w13_weight,
            w2_weight,
            weights_TK,
            ids_TK,
            activation=activation,
            global_num_experts=num_experts,
            expert_map=None,
            a1q_scale=None,
            a2_scale=None,
            workspace13=None,
            workspace2=None,
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )

    return run


@contextlib.contextmanager
def _single_process_groups() -> Iterator[None]:
    """vLLM layers ask for their parallel groups while they are built; a worker is alone in all of them.

    Afterwards the groups go: each keeps threads that wake 100 times a second on a core that kernels compute on. They
    meet in a file: torch's TCP store would listen on every interface. Gloo listens where GLOO_SOCKET_IFNAME says
    (deployments/worker_process.py).
    """
    with tempfile.TemporaryDirectory(prefix="switchyard-worker-") as folder:
        init_distributed_environment(
            world_size=1,
            rank=0,
            distributed_init_method=f"file://{folder}/store",
            local_rank=0,
            backend="gloo",
        )
        initialize_model_parallel()
    try:
        yield
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()


def _load_integers(
    folder: Path, layers: dict[int, RoutedExperts], spec: MoeSpec, shard: Shard, num_threads: int
) -> dict[int, IntegerExperts]:
    loaded = {
        ordinal: IntegerExperts(
            len(shard.experts),
            layer.hidden_size,
            layer.intermediate_size_per_partition,
            layer.activation.value,
            spec.dtype,
            num_threads,
        )
        for ordinal, layer in layers.items()
    }
    ordinals = {spec.layers[ordinal]: ordinal for ordinal in layers}
    try:
        for number, expert, name, matrix in hosted_integers(weight_files(folder), ordinals, shard.experts):
            ordinal = ordinals[number]
            loaded[ordinal].put(expert, _matrix_names(layers[ordinal])[name], matrix)
        for experts in loaded.values():
            experts.ready()
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}. Convert the checkpoint again.") from None
    return loaded


def _matrix_names(layer: RoutedExperts) -> dict[str, str]:
    """The checkpoint's name of a projection -> w1, w2 or w3."""
    names = (layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name)
    return dict(zip(names, ("w1", "w2", "w3"), strict=True))


def _load_layers(
    config: VllmConfig, skeleton: Any, spec: MoeSpec, shard: Shard, layers: Iterable[RoutedExperts]
) -> None:
    as_stored = config.quant_config is not None
    loader = PartialLoader(
        config.load_config, lambda files: hosted_weights(files, shard.experts, spec.num_experts, as_stored)
    )
    skeleton.load_weights(loader.get_all_weights(config.model_config, skeleton))
    for layer in layers:
        layer.quant_method.process_weights_after_loading(layer)
        layer._ensure_moe_quant_config_init()
        if layer.quant_method.is_monolithic:
            raise CheckpointError(
                f"vLLM's kernel {type(layer.quant_method).__name__} computes the gate itself, so these experts "
                "cannot be served apart from the engine on this device"
            )
