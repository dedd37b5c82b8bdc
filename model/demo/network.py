"""Grok-2's arithmetic in plain torch: the demo model's training network, and an oracle for tests.

Follows SGLang's Grok-2 forward (sglang/srt/models/grok.py), which sglang-jax calls the official implementation:
f32 router capped at 30, softmax over all experts, top-2 not renormalised; erf GELU; (mlp + moe)/sqrt(2); four norms per
layer; capped attention scores with a temperature for positions past `attn_temperature_len`; logits scaled, then capped.

Shape letters: B sequences, T tokens of one, S positions attended to, N = B*T, D hidden, H query heads, K key/value
heads, C head_dim, E experts, V vocabulary. Imports torch and safetensors only.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class GrokConfig:
    """The keys of Grok-2's config.json that decide the arithmetic."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    embedding_multiplier_scale: float
    output_multiplier_scale: float
    rope_theta: float
    max_position_embeddings: int
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    rms_norm_eps: float = 1e-5
    attn_logit_softcapping: float = 30.0
    router_logit_softcapping: float = 30.0
    final_logit_softcapping: float = 50.0
    attn_temperature_len: int = 1024

    @classmethod
    def from_json(cls, path: Path) -> GrokConfig:
        """Reads config.json; keys that do not change the arithmetic are left aside. Raises KeyError, TypeError."""
        raw: dict[str, Any] = json.loads(path.read_text())
        if raw["rope_type"] != "original" or not raw["residual_moe"] or raw["sliding_window_size"] > 0:
            raise ValueError(f"{path}: only residual MoE, rope_type 'original' and full attention are implemented")
        return cls(**{field.name: raw[field.name] for field in fields(cls) if field.name in raw})

    def to_json(self) -> dict[str, Any]:
        """The whole key set of xai-org/grok-2's config.json, with this config's values."""
        fixed = {
            "architectures": ["Grok1ForCausalLM"], "model_type": "git", "torch_dtype": "bfloat16", "residual_moe": True,
            "sliding_window_size": -1, "global_attn_every_n": 1, "rope_type": "original",
            "original_max_position_embeddings": self.max_position_embeddings, "scaling_factor": 16.0,
            "extrapolation_factor": 1.0, "attn_factor": 1.0, "beta_fast": 8, "beta_slow": 1,
        }  # fmt: skip
        return {**fixed, **asdict(self)}


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return cap * torch.tanh(x / cap)


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight, computed in float32, returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = x_BTD.float()
        return (F.rms_norm(x, (x.shape[-1],), eps=self.eps) * self.weight.float()).to(x_BTD.dtype)


def rope_tables(config: GrokConfig, start: int, end: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, C] f32 of positions start..end-1; inv_freq = theta^(-2i/C), unscaled (rope_type "original")."""
    i = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    phase_TC = torch.arange(start, end, dtype=torch.float32)[:, None] * config.rope_theta ** (-i / config.head_dim)
    return torch.cat([phase_TC, phase_TC], -1).cos(), torch.cat([phase_TC, phase_TC], -1).sin()


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Neox (rotate-half) rotary embedding over the whole head, in float32."""
    x = x_BHTC.float()
    low, high = x.chunk(2, -1)
    return (x * cos_TC + torch.cat([-high, low], -1) * sin_TC).to(x_BHTC.dtype)


def temperature(start: int, end: int, attn_temperature_len: int) -> Tensor:
    """t [T] of positions start..end-1: log2(pos)/log2(len) for 0-based positions past len, else 1."""
    pos_T = torch.arange(start, end, dtype=torch.float32)
    late = pos_T > attn_temperature_len
    return torch.where(late, pos_T.clamp(min=2).log2() / math.log2(attn_temperature_len), torch.ones(()))


class LayerCache:
    """Rotated keys and values [B, K, positions so far, C] of one layer."""

    def __init__(self) -> None:
        self.k_BKSC, self.v_BKSC = torch.empty(0), torch.empty(0)
        self.length = 0

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Appends T positions; returns all S so far."""
        if self.length:
            k_BKTC, v_BKTC = torch.cat([self.k_BKSC, k_BKTC], 2), torch.cat([self.v_BKSC, v_BKTC], 2)
        self.k_BKSC, self.v_BKSC, self.length = k_BKTC, v_BKTC, k_BKTC.shape[2]
        return k_BKTC, v_BKTC


class Attention(nn.Module):
    """Grouped-query attention with capped scores: T queries on S >= T keys, of which the last T are their own."""

    def __init__(self, c: GrokConfig) -> None:
        super().__init__()
        self.c = c
        query, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(query, c.hidden_size, bias=False)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], causal_TS: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        c, (B, T, _) = self.c, x_BTD.shape
        q_BHTC = rotate(self.q_proj(x_BTD).view(B, T, -1, c.head_dim).transpose(1, 2), *rope)
        k_BKTC = rotate(self.k_proj(x_BTD).view(B, T, -1, c.head_dim).transpose(1, 2), *rope)
        v_BKTC = self.v_proj(x_BTD).view(B, T, -1, c.head_dim).transpose(1, 2)
        if cache is not None:
            k_BKTC, v_BKTC = cache.extend(k_BKTC, v_BKTC)
        repeats = c.num_attention_heads // c.num_key_value_heads  # query head i uses key head i // repeats
        k_BHSC, v_BHSC = k_BKTC.repeat_interleave(repeats, 1), v_BKTC.repeat_interleave(repeats, 1)
        cap = c.attn_logit_softcapping
        s_BHTS = torch.tanh((q_BHTC * (c.head_dim**-0.5 / cap)) @ k_BHSC.transpose(2, 3)).float()
        S = k_BHSC.shape[2]
        if c.attn_temperature_len < S - 1:
            s_BHTS = s_BHTS * temperature(S - T, S, c.attn_temperature_len).to(s_BHTS.device)[:, None]
        p_BHTS = torch.softmax(torch.add(causal_TS, s_BHTS, alpha=cap), -1).to(v_BHSC.dtype)
        return self.o_proj((p_BHTS @ v_BHSC).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """The dense branch: down(gelu(gate x) * up x), erf GELU."""

    def __init__(self, c: GrokConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x_ND)) * self.up_proj(x_ND))


class Expert(nn.Module):
    """One expert: w2(gelu(w1 x) * w3 x), erf GELU."""

    def __init__(self, c: GrokConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(c.hidden_size, c.moe_intermediate_size, bias=False)
        self.w2 = nn.Linear(c.moe_intermediate_size, c.hidden_size, bias=False)
        self.w3 = nn.Linear(c.hidden_size, c.moe_intermediate_size, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x_ND)) * self.w3(x_ND))


class SparseMoE(nn.Module):
    """Router and experts. `last_probs_NE` and `last_topk_NK` are the latest call's, for losses and tests."""

    def __init__(self, c: GrokConfig) -> None:
        super().__init__()
        self.c = c
        self.gate = nn.Linear(c.hidden_size, c.num_local_experts, bias=False)
        self.experts = nn.ModuleList(Expert(c) for _ in range(c.num_local_experts))
        self.last_probs_NE, self.last_topk_NK = torch.empty(0), torch.empty(0, dtype=torch.long)

    def forward(self, x_ND: Tensor) -> Tensor:
        c = self.c
        with torch.autocast(x_ND.device.type, enabled=False):  # the router is float32 whatever the rest is
            logits_NE = F.linear(x_ND.float(), self.gate.weight.float())
            probs_NE = torch.softmax(softcap(logits_NE, c.router_logit_softcapping), -1)
        weights_NK, ids_NK = torch.topk(probs_NE, c.num_experts_per_tok, -1)  # not renormalised
        self.last_probs_NE, self.last_topk_NK = probs_NE, ids_NK
        order_M = ids_NK.flatten().argsort(stable=True)  # M = N*k (token, choice) pairs, grouped by expert
        token_M = order_M // c.num_experts_per_tok
        counts_E = torch.bincount(ids_NK.flatten(), minlength=c.num_local_experts).tolist()
        groups = torch.split(x_ND.index_select(0, token_M), counts_E)
        y_MD = torch.cat([expert(group) for expert, group in zip(self.experts, groups, strict=True)])
        y_MD = y_MD * weights_NK.flatten().index_select(0, order_M)[:, None]
        return torch.zeros_like(x_ND, dtype=y_MD.dtype).index_add(0, token_M, y_MD).to(x_ND.dtype)


class Layer(nn.Module):
    """h += norm(attn(norm(h))); h += norm((mlp(x) + moe(x)) / sqrt(2)) with x = norm(h)."""

    def __init__(self, c: GrokConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.block_sparse_moe = Attention(c), MLP(c), SparseMoE(c)
        self.pre_attn_norm, self.post_attn_norm = (RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(2))
        self.pre_moe_norm, self.post_moe_norm = (RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(2))

    def forward(
        self, h_BTD: Tensor, rope: tuple[Tensor, Tensor], causal_TS: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        h_BTD = h_BTD + self.post_attn_norm(self.self_attn(self.pre_attn_norm(h_BTD), rope, causal_TS, cache))
        x_ND = self.pre_moe_norm(h_BTD).flatten(0, 1)
        f_ND = (self.mlp(x_ND) + self.block_sparse_moe(x_ND)) / math.sqrt(2)
        return h_BTD + self.post_moe_norm(f_ND).view_as(h_BTD)


class Backbone(nn.Module):
    """Embeddings, layers and the last norm; its parameter names are the checkpoint's `model.*`."""

    def __init__(self, c: GrokConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Grok2(nn.Module):
    """The whole model. Parameter names equal the tensor names of the Hugging Face layout of xai-org/grok-2."""

    def __init__(self, config: GrokConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden(self, tokens_BT: Tensor, caches: list[LayerCache] | None = None) -> Tensor:
        """Final hidden states [B, T, D]; with caches (one per layer) the tokens follow what these hold."""
        c, device, start = self.config, tokens_BT.device, caches[0].length if caches else 0
        end = start + tokens_BT.shape[1]
        rope_cos, rope_sin = (table.to(device) for table in rope_tables(c, start, end))
        causal_TS = torch.full((end - start, end), -torch.inf, device=device).triu(start + 1)
        h_BTD = self.model.embed_tokens(tokens_BT) * c.embedding_multiplier_scale
        for i, layer in enumerate(self.model.layers):
            h_BTD = layer(h_BTD, (rope_cos, rope_sin), causal_TS, caches[i] if caches else None)
        normed: Tensor = self.model.norm(h_BTD)
        return normed

    def forward(self, tokens_BT: Tensor, caches: list[LayerCache] | None = None) -> Tensor:
        """Logits [B, T, V] float32: scaled, then capped (SGLang's order)."""
        logits = self.lm_head(self.hidden(tokens_BT, caches)).float() * self.config.output_multiplier_scale
        return softcap(logits, self.config.final_logit_softcapping)

    def routers(self) -> list[SparseMoE]:
        """The MoE blocks in layer order; their last_* tensors describe the latest forward."""
        return [module for module in self.modules() if isinstance(module, SparseMoE)]


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Grok2:
    """Builds the network of `folder`'s config.json with model.safetensors' values converted to `dtype`.

    Raises RuntimeError (torch) when a tensor is missing, unknown or of another shape."""
    network = Grok2(GrokConfig.from_json(folder / "config.json")).to(dtype)
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return network.eval()


@torch.no_grad()
def generate(
    network: Grok2, prompt: list[int], num_tokens: int, temp: float = 0.0, stop: tuple[int, ...] = (), seed: int = 0
) -> list[int]:
    """Up to `num_tokens` token ids after `prompt`, without the stop token; greedy when temp is 0."""
    generator, found = torch.Generator().manual_seed(seed), list[int]()
    caches = [LayerCache() for _ in range(network.config.num_hidden_layers)]
    for _ in range(num_tokens):
        logits_V = network(torch.tensor([found[-1:] or prompt]), caches)[0, -1]
        if temp > 0:
            chosen = int(torch.multinomial(torch.softmax(logits_V / temp, -1), 1, generator=generator))
        else:
            chosen = int(logits_V.argmax())
        if chosen in stop:
            break
        found.append(chosen)
    return found
