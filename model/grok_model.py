"""Grok-1 and Grok-2 for vLLM, exact to their public sources.

Which of the two: model/grok_spec.py. Where engines disagree, xAI's own code (xai-org/grok-1 model.py) decides Grok-1
and SGLang (srt/models/grok.py) Grok-2:
                        Grok-1                                  Grok-2
  GELU                  tanh approximation                      erf
  gate                  softmax over all, top-2 as they are     the same, on 30*tanh(logits/30)
  attention score       q.k * attn_output_multiplier, capped    q.k / sqrt(head_dim), capped, times t(position)
  feed-forward          experts                                 (dense MLP + experts) / sqrt(2)
  logits                x @ E^T * multiplier                    cap * tanh(x @ W^T * multiplier / cap)
The gate computes in float32 whatever the model's dtype. Grok-1's multipliers are rounded to the model's dtype first, as
xAI's are (78.5 and 0.578125 in bfloat16).
Left out on purpose: xAI's runner masks keys whose token is 0, its padding. Here padding is never in the cache, and a
token 0 in a prompt is a token like any other.

Shape letters: T tokens, D hidden size, E experts, K chosen experts, V vocabulary.
"""

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import GeluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, make_layers, maybe_prefix
from vllm.sequence import IntermediateTensors

from model.grok_attention import temperature_backend
from model.grok_spec import GrokSpec
from model.tensor_sets import each_once

# SGLang divides by this literal.
SQRT2 = 1.4142135623730951


def route(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool, *, cap: float
) -> tuple[Tensor, Tensor]:
    """Grok's gate, as vLLM's custom_routing_function: gating_output [T, E] float32 -> weights [T, K], experts [T, K].

    Softmax over all experts, then the K largest as they are: `renormalize` is vLLM's and is not obeyed.
    """
    logits_TE = gating_output.float()
    if cap:
        logits_TE = cap * torch.tanh(logits_TE / cap)
    weights_TK, experts_TK = torch.topk(torch.softmax(logits_TE, dim=-1), topk, dim=-1)
    return weights_TK, experts_TK.to(torch.int32)


class GrokMLP(nn.Module):
    """Grok-2's dense MLP beside the experts. Its output is this rank's part: the MoE runner adds up the ranks."""

    def __init__(self, spec: GrokSpec, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            spec.hidden_size,
            [spec.mlp_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            spec.mlp_size,
            spec.hidden_size,
            bias=False,
            reduce_results=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = GeluAndMul(approximate=_gelu_approximation(spec))

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj(x_TD)
        out_TD, _ = self.down_proj(self.act_fn(gate_up))
        return out_TD


def _gelu_approximation(spec: GrokSpec) -> str:
    return "none" if spec.activation == "gelu" else "tanh"


class GrokMoE(nn.Module):
    """The gate and the experts; `mlp` runs beside the experts and is added to their sum."""

    def __init__(
        self, spec: GrokSpec, mlp: GrokMLP | None, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.gate = ReplicatedLinear(
            spec.hidden_size,
            spec.num_experts,
            bias=False,
            params_dtype=torch.float32,
            quant_config=None,
            prefix=f"{prefix}.gate",
        )
        self.experts = FusedMoEFactory(
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.expert_size,
            renormalize=False,
            quant_config=quant_config,
            custom_routing_function=partial(route, cap=spec.router_cap),
            router_logits_dtype=torch.float32,
            activation=spec.activation,
            ckpt_names=("w1", "w2", "w3"),
            shared_experts=mlp,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE, _ = self.gate(x_TD.float())
        return self.experts(x_TD, logits_TE)


class GrokAttention(nn.Module):
    """Grouped-query attention with plain RoPE over the whole head, capped scores and, in Grok-2, a temperature."""

    def __init__(
        self,
        spec: GrokSpec,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        num_heads = spec.num_heads // tp_size
        num_kv_heads = max(1, spec.num_kv_heads // tp_size)
        self.q_size = num_heads * spec.head_dim
        self.kv_size = num_kv_heads * spec.head_dim
        self.qkv_proj = QKVParallelLinear(
            spec.hidden_size,
            spec.head_dim,
            spec.num_heads,
            spec.num_kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            spec.num_heads * spec.head_dim,
            spec.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        # Both references rotate in float32 and round the result.
        self.rotary_emb = get_rope(
            spec.head_dim,
            max_position=spec.num_positions,
            rope_parameters={"rope_type": "default", "rope_theta": spec.rotary_theta},
            dtype=torch.float32,
        )
        temperature = {}
        if spec.temperature_len:
            backend = temperature_backend(spec.head_dim, torch.get_default_dtype(), cache_config)
            temperature = {"attn_backend": backend, "temperature_len": spec.temperature_len}
        self.attn = Attention(
            num_heads,
            spec.head_dim,
            spec.score_scale,
            num_kv_heads=num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            logits_soft_cap=spec.attention_cap or None,
            prefix=f"{prefix}.attn",
            **temperature,
        )

    def forward(self, positions: Tensor, x_TD: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x_TD)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q.float(), k.float())
        out, _ = self.o_proj(self.attn(q.to(v.dtype), k.to(v.dtype), v))
        return out


class GrokDecoderLayer(nn.Module):
    """h += post_attn_norm(attention(pre_attn_norm(h))); h += post_moe_norm(feed_forward(pre_moe_norm(h)))."""

    def __init__(
        self,
        spec: GrokSpec,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.has_mlp = spec.mlp_size > 0
        self.self_attn = GrokAttention(spec, cache_config, quant_config, prefix=f"{prefix}.self_attn")
        # Registered before the experts hold it too, so that its parameters keep the checkpoint's names.
        self.mlp = GrokMLP(spec, quant_config, prefix=f"{prefix}.mlp") if self.has_mlp else None
        self.block_sparse_moe = GrokMoE(spec, self.mlp, quant_config, prefix=f"{prefix}.block_sparse_moe")
        self.pre_attn_norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.post_attn_norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.pre_moe_norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.post_moe_norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)

    def forward(self, positions: Tensor, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds the previous layer's output x to the residual first: one fused kernel with the norm."""
        if residual_TD is None:
            residual_TD = x_TD
            x_TD = self.pre_attn_norm(x_TD)
        else:
            x_TD, residual_TD = self.pre_attn_norm(x_TD, residual_TD)
        x_TD = self.post_attn_norm(self.self_attn(positions, x_TD))
        x_TD, residual_TD = self.pre_moe_norm(x_TD, residual_TD)
        x_TD = self.block_sparse_moe(x_TD)
        if self.has_mlp:
            x_TD = x_TD / SQRT2
        return self.post_moe_norm(x_TD), residual_TD


@support_torch_compile
class GrokModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        spec: GrokSpec = vllm_config.model_config.hf_config.spec
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size)
        self.embedding_multiplier = _multiplier(spec, spec.embedding_multiplier, vllm_config)
        self.start_layer, self.end_layer, self.layers = make_layers(
            spec.num_layers,
            lambda prefix: GrokDecoderLayer(spec, vllm_config.cache_config, vllm_config.quant_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids) * self.embedding_multiplier

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        x_TD = inputs_embeds
        if x_TD is None:
            assert input_ids is not None
            x_TD = self.embed_input_ids(input_ids)
        residual_TD = None
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x_TD, residual_TD = layer(positions, x_TD, residual_TD)
        x_TD, _ = self.norm(x_TD, residual_TD)
        return x_TD


def _multiplier(spec: GrokSpec, value: float, vllm_config: VllmConfig) -> float:
    """xAI multiplies by a scalar of the model's dtype, SGLang by the number itself."""
    # On the CPU whatever the default device is: a worker builds the model on the meta device.
    rounded = torch.tensor(value, dtype=vllm_config.model_config.dtype, device="cpu").item()
    return value if spec.is_grok2 else rounded


class Grok1ForCausalLM(nn.Module):
    """The architecture both released configs name. Weights: whole tensors with the names of xai-org/grok-2."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        }
    )
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        spec: GrokSpec = self.config.spec
        self.spec = spec
        self.model = GrokModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            spec.vocab_size,
            spec.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if spec.tied_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(spec.vocab_size)
        self.output_multiplier = _multiplier(spec, spec.output_multiplier, vllm_config)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[T, D] -> logits [T, V]; None on ranks that do not sample.

        The multiplier comes before the cap; vLLM's LogitsProcessor can only do it the other way round.
        """
        logits_TV = self.logits_processor(self.lm_head, hidden_states)
        if logits_TV is None:
            return None
        if not self.spec.final_cap:
            return logits_TV * self.output_multiplier
        cap = self.spec.final_cap
        return cap * torch.tanh(logits_TV.float() * (self.output_multiplier / cap))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(each_once(weights), mapper=self.hf_to_vllm_mapper)
