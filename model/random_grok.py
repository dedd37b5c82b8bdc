"""Random checkpoints with Grok's real dimensions, in the layouts in which they were released, or as Hugging Face's.

The dimensions are the catalog's (model/known_models.json); the layouts are those of model/ckpt0_layout.py (ckpt-0) and
model/grok_tensors.py (tp8: xai-org/grok-2, its experts cut into eight parts).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from model.catalog import known_config
from model.ckpt0_encoding import Part, float_parts, quantised_parts
from model.ckpt0_layout import LAYER_FILES, OUTER_FILES, Ckpt0Sizes, converted_config
from model.grok_spec import (
    ARCHITECTURE,
    GROK2_ATTENTION_CAP,
    GROK2_ROUTER_CAP,
    GrokSpec,
    check_spec,
    parse_spec,
)
from model.grok_tensors import Shapes, expected_shapes, hub_file_number
from model.random_checkpoint import Ckpt0File, RandomCheckpoint, SafetensorsFile, hub_checkpoint
from model.tp_shards import cut_dimension

NUM_SHARDS = 8  # of xAI's mesh in ckpt-0, and of the files of xai-org/grok-2


def grok_checkpoint(name: str, layout: str, sizes: Mapping[str, int]) -> RandomCheckpoint:
    """ "grok-1" as "ckpt-0" or "hf", "grok-2" as "tp8" or "hf"; `sizes` are the fields of GrokSpec unlike the released.

    The dense MLP of Grok-2 keeps its proportion to an expert. Raises ConfigError for sizes that no Grok can have.
    """
    spec = resized(parse_spec(known_config(name)), sizes)
    if layout == "ckpt-0":
        return _ckpt0(spec)
    if layout == "tp8":
        return RandomCheckpoint(list(_tp8_files(spec)), _grok2_config(spec), None, spec.vocab_size)
    config = _grok2_config(spec) if spec.is_grok2 else converted_config(_sizes(spec), spec.num_layers, _run_py(spec))
    return hub_checkpoint(_by_layer(spec), config, spec.vocab_size)


def resized(spec: GrokSpec, sizes: Mapping[str, int]) -> GrokSpec:
    """The model with other sizes, and the multipliers that belong to them. Raises ConfigError."""
    fields: dict[str, Any] = dict(sizes)
    changed = dataclasses.replace(spec, **fields)
    changed = dataclasses.replace(
        changed,
        mlp_size=spec.mlp_size * changed.expert_size // spec.expert_size,
        embedding_multiplier=math.sqrt(changed.hidden_size),
        score_scale=changed.head_dim**-0.5,
    )
    try:
        check_spec(changed)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    if changed.head_dim % 2:
        raise ConfigError(f"a head of {changed.head_dim} values cannot be rotated; it must be even.")
    for what, size in (("expert", changed.expert_size), ("all heads", changed.num_heads * changed.head_dim)):
        if size % NUM_SHARDS:
            raise ConfigError(f"the size of {what} is {size}, not a multiple of {NUM_SHARDS}, Grok's number of shards.")
    return changed


def _ckpt0(spec: GrokSpec) -> RandomCheckpoint:
    sizes = _sizes(spec)
    outer, layer = ([_ckpt0_contents(name, sizes) for name in names] for names in (OUTER_FILES, LAYER_FILES))
    contents = [*outer, *layer * spec.num_layers]
    files = [
        Ckpt0File(f"tensor{number:05d}_000", parts, num_inputs) for number, (parts, num_inputs) in enumerate(contents)
    ]
    return RandomCheckpoint(files, _run_py(spec), None, None)


def _ckpt0_contents(name: str, sizes: Ckpt0Sizes) -> tuple[list[Part], int]:
    """The parts of a file, and how many inputs its matrix has."""
    shape, scales = sizes.expected(name)
    parts = float_parts(shape) if scales is None else quantised_parts(shape, scales)
    is_in_out = len(shape) > 1 and name != "model.embed_tokens"  # the embeddings are [vocabulary, hidden]
    return parts, shape[-2] if is_in_out else shape[-1]


def _sizes(spec: GrokSpec) -> Ckpt0Sizes:
    return Ckpt0Sizes(
        vocab=spec.vocab_size,
        hidden=spec.hidden_size,
        experts=spec.num_experts,
        ffn=spec.expert_size,
        query=spec.num_heads * spec.head_dim,
        key=spec.num_kv_heads * spec.head_dim,
        shards=NUM_SHARDS,
    )


def _run_py(spec: GrokSpec) -> dict[str, Any]:
    """The fields of xAI's run.py, which `switchyard convert` reads from the config.json beside the files."""
    return {
        "vocab_size": spec.vocab_size,
        "emb_size": spec.hidden_size,
        "key_size": spec.head_dim,
        "num_q_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "num_layers": spec.num_layers,
        "num_experts": spec.num_experts,
        "num_selected_experts": spec.top_k,
        "sequence_len": spec.num_positions,
        "attn_output_multiplier": spec.score_scale,
        "embedding_multiplier_scale": spec.embedding_multiplier,
        "output_multiplier_scale": spec.output_multiplier,
    }


def _grok2_config(spec: GrokSpec) -> dict[str, Any]:
    """config.json with the fields of xai-org/grok-2."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "git",
        "torch_dtype": "bfloat16",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.mlp_size,
        "moe_intermediate_size": spec.expert_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "num_local_experts": spec.num_experts,
        "num_experts_per_tok": spec.top_k,
        "residual_moe": True,
        "rms_norm_eps": spec.rms_norm_eps,
        "embedding_multiplier_scale": spec.embedding_multiplier,
        "output_multiplier_scale": 0.5,
        "attn_logit_softcapping": GROK2_ATTENTION_CAP,
        "router_logit_softcapping": GROK2_ROUTER_CAP,
        "final_logit_softcapping": 50,
        "attn_temperature_len": 1024,
        "rope_theta": 208533496,
        "rope_type": "original",
        "original_max_position_embeddings": 8192,
        "scaling_factor": 16.0,
        "extrapolation_factor": 1.0,
        "attn_factor": 1.0,
        "beta_fast": 8,
        "beta_slow": 1,
        "max_position_embeddings": spec.num_positions,
        "sliding_window_size": -1,
        "global_attn_every_n": 1,
    }


def _tp8_files(spec: GrokSpec) -> Iterator[SafetensorsFile]:
    groups: dict[int, Shapes] = {}
    for name, shape in expected_shapes(spec).items():
        groups.setdefault(hub_file_number(name), {})[name] = shape
    for number, shapes in sorted(groups.items()):
        stem = f"pytorch_model-{number:05d}-TP"
        if not any(".experts." in name for name in shapes):
            yield SafetensorsFile(f"{stem}-common.safetensors", shapes)
            continue
        paths = [Path(f"{stem}-{rank:03d}.safetensors") for rank in range(NUM_SHARDS)]
        cut = {name: cut_dimension(name, paths) for name in shapes}
        parts = {
            name: tuple(size // NUM_SHARDS if place == cut[name] else size for place, size in enumerate(shape))
            for name, shape in shapes.items()
        }
        num_input_shards = NUM_SHARDS if set(cut.values()) == {1} else 1
        yield from (SafetensorsFile(path.name, parts, num_input_shards) for path in paths)


def _by_layer(spec: GrokSpec) -> list[Shapes]:
    """The tensors of one file per layer; those outside of the layers come first."""
    outer: Shapes = {}
    layers: list[Shapes] = [{} for _ in range(spec.num_layers)]
    for name, shape in expected_shapes(spec).items():
        parts = name.split(".")
        (layers[int(parts[2])] if parts[1] == "layers" else outer)[name] = shape
    return [outer, *layers]
