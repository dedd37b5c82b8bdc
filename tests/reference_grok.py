"""Grok-1 and Grok-2 in plain float32 PyTorch, from the text of the public sources; no vLLM, no code of model/.

Slow and without a cache: every call computes every position of one sequence. Weights are a dict with the names of
xai-org/grok-2; `config` is a config.json. Checked against the golden files in tests/e2e/test_grok_goldens.py.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def load_folder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """config.json and all tensors of a model folder, as float32."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= {name: tensor.float() for name, tensor in load_file(path).items()}
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), weights


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [T, H, D]; halves rotated against each other (neox)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    phase = (positions[:, None].double() * frequency).float()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * phase.cos() - second * phase.sin(), second * phase.cos() + first * phase.sin()], -1)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap) if cap else x


class ReferenceGrok:
    """forward(tokens) -> logits [T, V]. Afterwards gate_margins_T holds, for each position, how close the gate of any
    layer came to choosing another expert: rounding may then decide, for it and for every later position."""

    def __init__(self, config: dict, weights: dict[str, Tensor]) -> None:
        self.c, self.w = config, weights
        self.grok2 = bool(config.get("residual_moe"))
        self.gelu = "none" if self.grok2 else "tanh"
        self.gate_margins_T = torch.empty(0)

    def attention(self, x: Tensor, prefix: str) -> Tensor:
        c, w = self.c, self.w
        num_tokens, positions = len(x), torch.arange(len(x))
        heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        q = rotate((x @ w[f"{prefix}.q_proj.weight"].T).view(num_tokens, heads, dim), positions, c["rope_theta"])
        k = rotate((x @ w[f"{prefix}.k_proj.weight"].T).view(num_tokens, kv_heads, dim), positions, c["rope_theta"])
        v = (x @ w[f"{prefix}.v_proj.weight"].T).view(num_tokens, kv_heads, dim)
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) * (dim**-0.5 if self.grok2 else c["attn_output_multiplier"])
        scores = soft_cap(scores, c["attn_logit_softcapping"])
        length = c.get("attn_temperature_len") or 0
        if self.grok2 and length:
            t = [math.log2(p) / math.log2(length) if p > length else 1.0 for p in range(num_tokens)]
            scores = scores * torch.tensor(t)[:, None]
        causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, v).reshape(num_tokens, -1) @ w[f"{prefix}.o_proj.weight"].T

    def gated(self, x: Tensor, gate: str, up: str, down: str) -> Tensor:
        w = self.w
        return (torch.nn.functional.gelu(x @ w[gate].T, approximate=self.gelu) * (x @ w[up].T)) @ w[down].T

    def experts(self, x: Tensor, prefix: str) -> Tensor:
        c = self.c
        logits = x @ self.w[f"{prefix}.gate.weight"].T
        if self.grok2:
            logits = soft_cap(logits, c["router_logit_softcapping"])
        top_k = c["num_experts_per_tok"]
        probabilities, chosen = logits.softmax(-1).topk(top_k + 1)
        margins_T = probabilities[:, top_k - 1] - probabilities[:, top_k]
        self.gate_margins_T = torch.minimum(self.gate_margins_T, margins_T)
        probabilities, chosen = probabilities[:, :top_k], chosen[:, :top_k]
        out = torch.zeros_like(x)
        for expert in range(c["num_local_experts"]):
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            if len(rows):
                names = [f"{prefix}.experts.{expert}.{which}.weight" for which in ("w1", "w3", "w2")]
                out.index_add_(0, rows, self.gated(x[rows], *names) * probabilities[rows, slots, None])
        return out

    def feed_forward(self, x: Tensor, prefix: str) -> Tensor:
        out = self.experts(x, f"{prefix}.block_sparse_moe")
        if not self.grok2:
            return out
        names = [f"{prefix}.mlp.{which}_proj.weight" for which in ("gate", "up", "down")]
        return (out + self.gated(x, *names)) / math.sqrt(2)

    def forward(self, tokens: list[int]) -> Tensor:
        c, w = self.c, self.w

        def norm(x: Tensor, name: str) -> Tensor:
            return rms_norm(x, w[f"{name}.weight"], c["rms_norm_eps"])

        self.gate_margins_T = torch.ones(len(tokens))
        h = w["model.embed_tokens.weight"][torch.tensor(tokens)] * c["embedding_multiplier_scale"]
        for layer in range(c["num_hidden_layers"]):
            p = f"model.layers.{layer}"
            h = h + norm(self.attention(norm(h, f"{p}.pre_attn_norm"), f"{p}.self_attn"), f"{p}.post_attn_norm")
            h = h + norm(self.feed_forward(norm(h, f"{p}.pre_moe_norm"), p), f"{p}.post_moe_norm")
        head = w["lm_head.weight"] if self.grok2 else w["model.embed_tokens.weight"]
        logits = norm(h, "model.norm") @ head.T * c["output_multiplier_scale"]
        return soft_cap(logits, c.get("final_logit_softcapping") or 0) if self.grok2 else logits

    def greedy(self, tokens: list[int], count: int) -> tuple[list[int], list[float]]:
        """The next `count` tokens, and for each the margin between the best two logits."""
        out, margins = [], []
        for _ in range(count):
            best = self.forward([*tokens, *out])[-1].topk(2)
            out.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
        return out, margins


def random_weights(config: dict, seed: int) -> dict[str, Tensor]:
    """Random weights for a config.json, of sizes that keep every nonlinearity busy."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * gain * columns**-0.5

    def scale() -> Tensor:
        return 0.5 + torch.rand(config["hidden_size"], generator=generator)

    c, hidden = config, config["hidden_size"]
    grok2 = bool(c.get("residual_moe"))
    expert_size = c.get("moe_intermediate_size") or c["intermediate_size"]
    q_size, kv_size = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    weights = {"model.embed_tokens.weight": matrix(c["vocab_size"], hidden, 4.0), "model.norm.weight": scale()}
    if grok2:
        weights["lm_head.weight"] = matrix(c["vocab_size"], hidden, 6.0)
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        for norm in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            weights[f"{p}.{norm}.weight"] = scale()
        weights[f"{p}.self_attn.q_proj.weight"] = matrix(q_size, hidden, 2.5)
        weights[f"{p}.self_attn.k_proj.weight"] = matrix(kv_size, hidden, 2.5)
        weights[f"{p}.self_attn.v_proj.weight"] = matrix(kv_size, hidden)
        weights[f"{p}.self_attn.o_proj.weight"] = matrix(hidden, q_size)
        weights[f"{p}.block_sparse_moe.gate.weight"] = matrix(c["num_local_experts"], hidden, 3.0)
        for expert in range(c["num_local_experts"]):
            e = f"{p}.block_sparse_moe.experts.{expert}"
            weights[f"{e}.w1.weight"] = matrix(expert_size, hidden, 2.0)
            weights[f"{e}.w3.weight"] = matrix(expert_size, hidden)
            weights[f"{e}.w2.weight"] = matrix(hidden, expert_size)
        if grok2:
            weights[f"{p}.mlp.gate_proj.weight"] = matrix(c["intermediate_size"], hidden, 2.0)
            weights[f"{p}.mlp.up_proj.weight"] = matrix(c["intermediate_size"], hidden)
            weights[f"{p}.mlp.down_proj.weight"] = matrix(hidden, c["intermediate_size"])
    return weights
