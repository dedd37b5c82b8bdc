"""What a Grok config means, and what is refused."""

import json
from pathlib import Path

import pytest

from model.grok_spec import grok1_ffn_size, is_grok, parse_spec

SIZES = {
    "architectures": ["Grok1ForCausalLM"],
    "vocab_size": 131072,
    "hidden_size": 6144,
    "intermediate_size": 32768,
    "num_hidden_layers": 64,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
}
GROK2 = json.loads((Path(__file__).parents[1] / "goldens/grok2-tiny/unsharded/config.json").read_text(encoding="utf-8"))


def test_grok2_as_released() -> None:
    spec = parse_spec(GROK2)
    assert (spec.generation, spec.activation, spec.temperature_len) == (2, "gelu", 40)
    assert (spec.attention_cap, spec.router_cap, spec.final_cap) == (30, 30, 50)
    assert (spec.expert_size, spec.mlp_size) == (128, 256)
    assert spec.score_scale == 32**-0.5
    assert not spec.tied_embeddings


def test_grok1_from_sizes_alone() -> None:
    spec = parse_spec(SIZES)
    assert (spec.generation, spec.activation, spec.temperature_len) == (1, "gelu_tanh", 0)
    assert (spec.attention_cap, spec.router_cap, spec.final_cap) == (30, 0, 0)
    assert (spec.num_experts, spec.top_k, spec.head_dim, spec.mlp_size) == (8, 2, 128, 0)
    assert spec.score_scale == 128**-0.5
    assert spec.embedding_multiplier == 78.38367176906169
    assert spec.output_multiplier == 0.5773502691896257
    assert spec.rotary_theta == 10000
    assert spec.tied_embeddings


def test_grok1_with_the_names_of_run_py() -> None:
    spec = parse_spec(
        {
            "emb_size": 128,
            "key_size": 32,
            "num_q_heads": 4,
            "num_kv_heads": 2,
            "num_layers": 3,
            "widening_factor": 4,
            "vocab_size": 512,
            "num_experts": 8,
            "num_selected_experts": 2,
            "attn_output_multiplier": 0.2,
            "sequence_len": 256,
        }
    )
    assert (spec.hidden_size, spec.head_dim, spec.num_heads, spec.num_kv_heads) == (128, 32, 4, 2)
    assert (spec.expert_size, spec.num_positions, spec.score_scale) == (344, 256, 0.2)


def test_released_expert_width() -> None:
    assert grok1_ffn_size(6144, 8) == 32768


@pytest.mark.parametrize("key", ["attn_temperature_len", "router_logit_softcapping", "final_logit_softcapping"])
def test_generation_without_residual_moe(key: str) -> None:
    assert parse_spec(SIZES | {key: 30}).is_grok2
    assert not parse_spec(SIZES | {key: 0}).is_grok2
    assert not parse_spec(SIZES | {key: None, "residual_moe": False}).is_grok2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual_moe": False, "attn_temperature_len": 1024}, "only in Grok-2"),
        ({"rope_type": "yarn"}, "rope_type"),
        ({"residual_moe": True, "attn_temperature_len": 1}, "at least 2"),
        ({"num_key_value_heads": 7}, "not divisible"),
        ({"num_experts_per_tok": 9}, "9 with 8 experts"),
        ({"sliding_window_size": 512, "global_attn_every_n": 4}, "sliding-window"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_spec(SIZES | change)


def test_architecture_decides() -> None:
    assert is_grok({"architectures": ["Grok1ForCausalLM"], "model_type": "git"})
    assert is_grok({"architectures": ["Grok1ModelForCausalLM"], "model_type": "mixtral"})
    assert is_grok({"model_type": "grok-1"})
    assert not is_grok({"model_type": "git"})
    assert not is_grok({"architectures": ["GitForCausalLM"], "model_type": "git"})
