"""Experts in host memory beside a GPU: what vLLM's build for GPUs has no kernel for, computed by PyTorch.

vLLM's CPU kernels for experts come with its CPU build alone. A worker of the GPU build that has no GPU (worker.num_gpus
0, a shadow, a plan's "cpu") computes integer experts with model/integer_experts.py and plain ones here: one matrix
product after the other, for the tokens of one expert at a time.

Letters: E experts, D hidden, F inner size, G what the first product gives (2F with a gate), T tokens, K chosen experts
per token, N tokens of one expert.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod


def _gated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(h_NG: Tensor) -> Tensor:
        gate_NF, up_NF = h_NG.chunk(2, dim=-1)
        return function(gate_NF) * up_NF

    return apply


def _swiglu_oai(h_NG: Tensor) -> Tensor:
    """gpt-oss: gate and up projection alternate, both are limited. Source: modeling_gpt_oss.py of transformers 4.55."""
    gate_NF, up_NF = h_NG[:, ::2].clamp(max=7.0), h_NG[:, 1::2].clamp(-7.0, 7.0)
    return (up_NF + 1) * (gate_NF * torch.sigmoid(1.702 * gate_NF))


# vLLM's names of activations (vllm/model_executor/layers/fused_moe/activation.py).
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _gated(silu),
    "gelu": _gated(gelu),
    "gelu_tanh": _gated(lambda gate_NF: gelu(gate_NF, approximate="tanh")),
    "swigluoai": _swiglu_oai,
}


def can_compute(activation: str) -> bool:
    """Whether experts with that activation can be computed here."""
    return activation in _ACTIVATIONS


class HostMethod(UnquantizedFusedMoEMethod):
    """To vLLM its own method for plain weights, but for kernels, of which it chooses none."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.unquantized_backend = UnquantizedMoeBackend.TRITON  # the one that pads no sizes

    @property
    def is_monolithic(self) -> bool:
        return False

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """They stay as they are."""


def host_kernel(layer: RoutedExperts) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """run(out_TD, x_TD, weights_TK, ids_TK): writes each token's weighted sum over its experts into out.

    x and out have the dtype of the layer's weights, weights are float32, ids int32, -1 for an expert that is not here;
    all on the CPU. An expert's answer is rounded to that dtype, the sum over a token's experts is float32.
    """
    return experts_of(
        layer.w13_weight,
        layer.w2_weight,
        getattr(layer, "w13_bias", None),
        getattr(layer, "w2_bias", None),
        layer.activation.value,
    )


def experts_of(
    w13_EGD: Tensor, w2_EDF: Tensor, bias13_EG: Tensor | None, bias2_ED: Tensor | None, activation: str
) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """host_kernel() of such weights."""
    activate = _ACTIVATIONS[activation]
    biases13: Any = bias13_EG if bias13_EG is not None else [None] * len(w13_EGD)
    biases2: Any = bias2_ED if bias2_ED is not None else [None] * len(w2_EDF)

    def run(out_TD: Tensor, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> None:
        sum_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        ids = ids_TK.numpy()
        for expert in np.unique(ids[ids >= 0]):
            rows_N, columns_N = map(torch.from_numpy, (ids == expert).nonzero())
            h_NG = linear(x_TD[rows_N], w13_EGD[expert], biases13[expert])
            y_ND = linear(activate(h_NG), w2_EDF[expert], biases2[expert])
            # A router may choose an expert twice for a token; index_add_ adds both.
            sum_TD.index_add_(0, rows_N, y_ND.float() * weights_TK[rows_N, columns_N, None])
        out_TD.copy_(sum_TD)

    return run
