"""The tensors that a Grok checkpoint must have, so that a file which is not there is missed before anything starts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from model.grok_spec import GrokSpec, parse_spec
from model.quantised import config_format, logical_shapes
from model.tp_shards import assembled_shape, is_sharded, shard_sets

Shapes = dict[str, tuple[int, ...]]
Headers = Mapping[Path, Mapping[str, Mapping[str, Any]]]

# Where xai-org/grok-2 keeps what: the number in pytorch_model-<number>-TP-*.safetensors, by the end of the name.
_HUB_FILES = (
    "model.embed_tokens",
    "lm_head",
    "model.norm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
    "w1",
    "w2",
    "w3",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
    "pre_attn_norm",
    "post_attn_norm",
    "pre_moe_norm",
    "post_moe_norm",
    "block_sparse_moe.gate",
)


def expected_shapes(spec: GrokSpec) -> Shapes:
    """Every tensor of the checkpoint: name -> shape, matrices as [out, in]."""
    hidden = (spec.hidden_size,)
    shapes: Shapes = {"model.embed_tokens.weight": (spec.vocab_size, *hidden), "model.norm.weight": hidden}
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, *hidden)
    for layer in range(spec.num_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _layer(spec)}
    return shapes


def _layer(spec: GrokSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, expert, mlp = spec.hidden_size, spec.expert_size, spec.mlp_size
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    for norm in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
        yield norm, (hidden,)
    yield "self_attn.q_proj", (query, hidden)
    yield "self_attn.k_proj", (key, hidden)
    yield "self_attn.v_proj", (key, hidden)
    yield "self_attn.o_proj", (hidden, query)
    yield "block_sparse_moe.gate", (spec.num_experts, hidden)
    if mlp:
        yield "mlp.gate_proj", (mlp, hidden)
        yield "mlp.up_proj", (mlp, hidden)
        yield "mlp.down_proj", (hidden, mlp)
    for number in range(spec.num_experts):
        yield f"block_sparse_moe.experts.{number}.w1", (expert, hidden)
        yield f"block_sparse_moe.experts.{number}.w3", (expert, hidden)
        yield f"block_sparse_moe.experts.{number}.w2", (hidden, expert)


def check_grok_tensors(folder: Path, config: Mapping[str, Any], headers: Headers) -> None:
    """Raises CheckpointError when a tensor is missing or has another shape, naming the file where that can be told.

    headers: read_header of each of the folder's files. Tensors cut for TP count when all their parts are there.
    """
    try:
        expected = expected_shapes(parse_spec(config))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    found: Shapes = {}
    stored = config_format(config, folder / "config.json")
    shapes = {path: logical_shapes(header, stored) for path, header in headers.items()}
    where: dict[str, Path] = {}
    for files in shard_sets(headers):
        for name in {name: None for path in files for name in shapes[path]}:
            parts = [shapes[path][name] for path in files if name in shapes[path]]
            if len(parts) < len(files):
                lacking = next(path for path in files if name not in shapes[path])
                raise CheckpointError(f"{lacking} has no part of {name}, which {files[0].name} and others have")
            found[name], where[name] = assembled_shape(name, parts, files), files[0]
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(
                f"{folder} has no {name}{_hub_file(name, headers)}. Download the rest of the checkpoint."
            )
        if found[name] != shape:
            raise CheckpointError(
                f"{where[name]} has {name} as {list(found[name])}, config.json calls for {list(shape)}: "
                "parts are missing, or the config belongs to another checkpoint."
            )


def _hub_file(name: str, headers: Headers) -> str:
    """Where the missing tensor should have been."""
    if not is_sharded(headers):
        return ""
    return f" (in xai-org/grok-2: pytorch_model-{hub_file_number(name):05d}-TP-*.safetensors)"


def hub_file_number(name: str) -> int:
    """In which pytorch_model-<number>-TP-*.safetensors xai-org/grok-2 keeps a tensor."""
    stem = name.removesuffix(".weight")
    return next(number for number, end in enumerate(_HUB_FILES) if stem.endswith(end))
