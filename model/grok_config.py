"""Grok's config class, and how vLLM is made to use it.

xai-org/grok-2's config.json says model_type "git", which Transformers knows as Microsoft's vision model GIT, so the
type cannot decide. The architecture does: GrokConfigParser takes the configs that name Grok and leaves every other
to vLLM.
"""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from vllm.transformers_utils.config import (
    HFConfigParser,
    get_config_parser,
    register_config_parser,
)

from model.grok_spec import ARCHITECTURE, GrokSpec, is_grok, parse_spec


class Grok1Config(PreTrainedConfig):
    """A config.json of Grok-1 or Grok-2, with the attribute names that vLLM reads.

    Every key of the file stays an attribute; `spec` is the parsed meaning (model/grok_spec.py).
    Raises ValueError as parse_spec does.
    """

    model_type = "grok-1"

    def __init__(self, **raw: Any) -> None:
        raw.pop("model_type", None)
        spec = parse_spec(raw) if raw else None  # Transformers makes an empty instance to find what differs
        if spec is not None:
            raw |= _vllm_attributes(spec)
        for name in ("rope_theta", "rope_type", "rope_scaling"):  # now in rope_parameters; vLLM would read them again
            raw.pop(name, None)
        super().__init__(**raw)
        if spec is not None:
            self.architectures = [ARCHITECTURE]

    @property
    def spec(self) -> GrokSpec:
        return parse_spec(self.to_dict())


def _vllm_attributes(spec: GrokSpec) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.mlp_size or spec.expert_size,
        "moe_intermediate_size": spec.expert_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "num_local_experts": spec.num_experts,
        "num_experts_per_tok": spec.top_k,
        "max_position_embeddings": spec.num_positions,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rotary_theta},
        "tie_word_embeddings": spec.tied_embeddings,
        "residual_moe": spec.is_grok2,
        "embedding_multiplier_scale": spec.embedding_multiplier,
        "output_multiplier_scale": spec.output_multiplier,
        "attn_logit_softcapping": spec.attention_cap,
    }
    if spec.is_grok2:
        attributes |= {
            "router_logit_softcapping": spec.router_cap,
            "final_logit_softcapping": spec.final_cap,
            "attn_temperature_len": spec.temperature_len,
        }
    else:
        attributes["attn_output_multiplier"] = spec.score_scale
    return attributes


class GrokConfigParser(HFConfigParser):
    """vLLM's parser of config.json, which recognises Grok by its architecture."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PreTrainedConfig]:
        raw, _ = PreTrainedConfig.get_config_dict(model, revision=revision, code_revision=code_revision)
        if not is_grok(raw):
            return super().parse(model, trust_remote_code, revision, code_revision, **kwargs)
        overrides = kwargs.get("hf_overrides")
        if isinstance(overrides, dict):
            raw = raw | overrides
        return raw, Grok1Config(**raw)


def register_config() -> None:
    """Make this process's vLLM and Transformers read Grok configs. Idempotent."""
    AutoConfig.register(Grok1Config.model_type, Grok1Config, exist_ok=True)
    if isinstance(get_config_parser("hf"), GrokConfigParser):
        return
    logger = logging.getLogger("vllm.transformers_utils.config")
    was_disabled, logger.disabled = logger.disabled, True  # it warns in every process that "hf" is overwritten
    try:
        register_config_parser("hf")(GrokConfigParser)
    finally:
        logger.disabled = was_disabled
