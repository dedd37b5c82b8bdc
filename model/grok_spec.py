"""What a Grok config.json says, as one frozen value. Plain Python: no vLLM, no torch.

Both released models call themselves Grok1ForCausalLM; the config tells which of the two it is:
- `residual_moe` decides where it is given (true: Grok-2, false: Grok-1);
- without it, a positive `attn_temperature_len`, `router_logit_softcapping` or `final_logit_softcapping` means Grok-2;
- otherwise Grok-1. Its config may use Hugging Face names or those of xAI's run.py.
`model_type` is not looked at: the released files say "git", "mixtral" or nothing.

Sources: Grok-1 from xai-org/grok-1 model.py and run.py, Grok-2 from SGLang srt/models/grok.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# run.py of xai-org/grok-1
GROK1_EMBEDDING_MULTIPLIER = 78.38367176906169
GROK1_OUTPUT_MULTIPLIER = 0.5773502691896257
GROK1_ATTENTION_CAP = 30.0
# config.json of xai-org/grok-2
GROK2_ROUTER_CAP = 30.0
GROK2_ATTENTION_CAP = 30.0

ARCHITECTURE = "Grok1ForCausalLM"
# The second is the name community conversions of Grok-1 use.
ARCHITECTURES = (ARCHITECTURE, "Grok1ModelForCausalLM")

_GROK2_KEYS = ("attn_temperature_len", "router_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True)
class GrokSpec:
    """Everything the forward pass depends on. A cap or length of 0 means: not there.

    rotary_theta and num_positions: plain RoPE over the whole head; num_positions is the longest sequence in tokens.
    expert_size and mlp_size: widths of the gated feed-forward of one expert and of the dense MLP beside them.
    """

    generation: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_size: int
    mlp_size: int
    activation: str
    rms_norm_eps: float
    rotary_theta: float
    num_positions: int
    embedding_multiplier: float
    output_multiplier: float
    score_scale: float
    attention_cap: float
    router_cap: float
    final_cap: float
    temperature_len: int
    tied_embeddings: bool

    @property
    def is_grok2(self) -> bool:
        return self.generation == 2


def parse_spec(raw: Mapping[str, Any]) -> GrokSpec:
    """Read a config.json.

    Raises ValueError for a missing size, for contradictory keys, and for features no public Grok code computes.
    """
    _refuse_unknown_features(raw)
    spec = _grok2(raw) if _is_grok2(raw) else _grok1(raw)
    check_spec(spec)
    return spec


def is_grok(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is Grok's: by its architectures, or, where it names none, by model_type."""
    architectures = raw.get("architectures")
    if architectures:
        return any(name in ARCHITECTURES for name in architectures)
    return raw.get("model_type") in ("grok-1", "grok1", "grok")


def _is_grok2(raw: Mapping[str, Any]) -> bool:
    hints = [key for key in _GROK2_KEYS if raw.get(key)]
    residual = raw.get("residual_moe")
    if residual is None:
        return bool(hints)
    if not residual and hints:
        raise ValueError(f"residual_moe is false (Grok-1), but {', '.join(hints)} exist only in Grok-2")
    return bool(residual)


def _refuse_unknown_features(raw: Mapping[str, Any]) -> None:
    rope_type = raw.get("rope_type") or "default"
    if rope_type not in ("original", "default"):
        raise ValueError(f"rope_type {rope_type!r} is not supported; Grok uses 'original' (plain RoPE)")
    if (raw.get("sliding_window_size") or -1) > 0 and (raw.get("global_attn_every_n") or 1) != 1:
        raise ValueError("sliding-window attention is not supported for Grok")


def _common(raw: Mapping[str, Any]) -> dict[str, Any]:
    hidden_size = int(_required(raw, "hidden_size", "emb_size"))
    num_heads = int(_required(raw, "num_attention_heads", "num_q_heads"))
    head_dim = _first(raw, "head_dim", "key_size", "attention_head_dim")
    return {
        "vocab_size": int(_required(raw, "vocab_size")),
        "hidden_size": hidden_size,
        "num_layers": int(_required(raw, "num_hidden_layers", "num_layers")),
        "num_heads": num_heads,
        "num_kv_heads": int(_first(raw, "num_key_value_heads", "num_kv_heads") or num_heads),
        "head_dim": int(head_dim or hidden_size // num_heads),
        "num_experts": int(_first(raw, "num_local_experts", "num_experts") or 8),
        "top_k": int(_first(raw, "num_experts_per_tok", "num_selected_experts") or 2),
        "rms_norm_eps": float(raw.get("rms_norm_eps") or 1e-5),
        "rotary_theta": _rope_theta(raw),
        "num_positions": int(_first(raw, "max_position_embeddings", "sequence_len") or 8192),
    }


def _grok1(raw: Mapping[str, Any]) -> GrokSpec:
    common = _common(raw)
    expert_size = _first(raw, "moe_intermediate_size", "intermediate_size", "ffn_size")
    if expert_size is None and raw.get("widening_factor") is not None:
        expert_size = grok1_ffn_size(common["hidden_size"], raw["widening_factor"])
    if expert_size is None:
        raise ValueError("the Grok config lacks intermediate_size")
    score_scale = raw.get("attn_output_multiplier")
    tied = raw.get("tie_word_embeddings")
    return GrokSpec(
        **common,
        generation=1,
        expert_size=int(expert_size),
        mlp_size=0,
        activation="gelu_tanh",
        embedding_multiplier=_number(raw, GROK1_EMBEDDING_MULTIPLIER, "embedding_multiplier_scale"),
        output_multiplier=_number(raw, GROK1_OUTPUT_MULTIPLIER, "output_multiplier_scale"),
        score_scale=float(common["head_dim"] ** -0.5 if score_scale is None else score_scale),
        attention_cap=_number(raw, GROK1_ATTENTION_CAP, "attn_logit_softcapping", "max_attn_value"),
        router_cap=0.0,
        final_cap=0.0,
        temperature_len=0,
        tied_embeddings=True if tied is None else bool(tied),
    )


def _grok2(raw: Mapping[str, Any]) -> GrokSpec:
    common = _common(raw)
    mlp_size = int(_required(raw, "intermediate_size"))
    return GrokSpec(
        **common,
        generation=2,
        expert_size=int(_first(raw, "moe_intermediate_size") or mlp_size),
        mlp_size=mlp_size,
        activation="gelu",
        embedding_multiplier=_number(raw, 1.0, "embedding_multiplier_scale"),
        output_multiplier=_number(raw, 1.0, "output_multiplier_scale"),
        score_scale=common["head_dim"] ** -0.5,
        attention_cap=_number(raw, GROK2_ATTENTION_CAP, "attn_logit_softcapping"),
        router_cap=_number(raw, GROK2_ROUTER_CAP, "router_logit_softcapping"),
        final_cap=_number(raw, 0.0, "final_logit_softcapping"),
        temperature_len=max(0, int(raw.get("attn_temperature_len") or 0)),
        tied_embeddings=bool(raw.get("tie_word_embeddings")),
    )


def grok1_ffn_size(hidden_size: int, widening_factor: float) -> int:
    """Width of an expert, in units (xai-org/grok-1 model.py, ffn_size): two thirds, rounded up to a multiple of 8."""
    size = int(widening_factor * hidden_size) * 2 // 3
    return size + (8 - size) % 8


def check_spec(spec: GrokSpec) -> None:
    """Raises ValueError for sizes and scales that do not go together."""
    if spec.num_heads % spec.num_kv_heads:
        raise ValueError(f"{spec.num_heads} attention heads are not divisible by {spec.num_kv_heads} key-value heads")
    if not 1 <= spec.top_k <= spec.num_experts:
        raise ValueError(f"num_experts_per_tok is {spec.top_k} with {spec.num_experts} experts")
    if spec.temperature_len == 1:
        raise ValueError("attn_temperature_len must be at least 2: the temperature divides by its logarithm")
    if not math.isfinite(spec.score_scale) or spec.score_scale <= 0:
        raise ValueError(f"the attention score scale is {spec.score_scale}")


def _rope_theta(raw: Mapping[str, Any]) -> float:
    parameters = raw.get("rope_parameters") or {}
    return float(raw.get("rope_theta") or parameters.get("rope_theta") or 10000.0)


def _first(raw: Mapping[str, Any], *names: str) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def _required(raw: Mapping[str, Any], *names: str) -> Any:
    value = _first(raw, *names)
    if value is None:
        raise ValueError(f"the Grok config lacks {names[0]}")
    return value


def _number(raw: Mapping[str, Any], default: float, *names: str) -> float:
    value = _first(raw, *names)
    return default if value is None else float(value)
