"""What a whole ckpt-0 folder must look like: which file is which tensor, their shapes, and the model's config.json.

One file per tensor, in the order of JAX's sorted tree, so layers come in string order: 0, 1, 10, 11, .., 2, 20, ..
File 0 is the embeddings, file 1 the final norm, then twelve per layer (LAYER_FILES). Nothing in a file tells its name:
a file in another's place is known by its shape, or by a checksum (model/ckpt0_checksums.py).

Shapes: V vocabulary, D hidden, E experts, F expert inner size, Q and K query and key heads x head size, S xAI's model
shards, each of which has its own row of scales in a row-parallel matrix.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from model.ckpt0_pickle import TensorFile, inspect_file
from model.grok_spec import (
    ARCHITECTURE,
    GROK1_ATTENTION_CAP,
    GROK1_EMBEDDING_MULTIPLIER,
    GROK1_OUTPUT_MULTIPLIER,
    grok1_ffn_size,
)

# In file order, with the names of xai-org/grok-2. Matrices are [in, out] on disk and [out, in] in safetensors.
LAYER_FILES = (
    "block_sparse_moe.experts.w1",  # moe/linear: gate, goes through the GELU
    "block_sparse_moe.experts.w2",  # moe/linear_1: down
    "block_sparse_moe.experts.w3",  # moe/linear_v: up
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
OUTER_FILES = ("model.embed_tokens", "model.norm")

# run.py of xai-org/grok-1: what the files do not tell.
RELEASED: Mapping[str, Any] = {
    "key_size": 128,
    "attn_output_multiplier": 0.08838834764831845,
    "embedding_multiplier_scale": GROK1_EMBEDDING_MULTIPLIER,
    "output_multiplier_scale": GROK1_OUTPUT_MULTIPLIER,
    "sequence_len": 8192,
    "num_selected_experts": 2,
}
_RELEASED_VOCAB_AND_HIDDEN = (131072, 6144)
_RELEASED_LAYERS = 64

_FILE_NAME = re.compile(r"tensor(\d{5,})_(\d{3})")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Ckpt0:
    """A folder whose files all have the structure and the shapes that their places call for.

    outer: the files of OUTER_FILES; layers[l]: those of LAYER_FILES for layer l, in numerical order of layers.
    config: the config.json of the converted model.
    """

    outer: tuple[TensorFile, ...]
    layers: tuple[tuple[TensorFile, ...], ...]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Ckpt0Sizes:
    """The numbers that the shapes of all files follow from; query and key count values, all heads together."""

    vocab: int
    hidden: int
    experts: int
    ffn: int
    query: int
    key: int
    shards: int

    def expected(self, name: str) -> tuple[Shape, Shape | None]:
        """(shape, shape of the scales) of the file of that name."""
        hidden, ffn = self.hidden, self.ffn
        matrices = {
            "block_sparse_moe.experts.w1": (hidden, ffn, 1),
            "block_sparse_moe.experts.w2": (ffn, hidden, self.shards),
            "block_sparse_moe.experts.w3": (hidden, ffn, 1),
            "self_attn.k_proj": (hidden, self.key, 1),
            "self_attn.o_proj": (self.query, hidden, self.shards),
            "self_attn.q_proj": (hidden, self.query, 1),
            "self_attn.v_proj": (hidden, self.key, 1),
        }
        if name in matrices:
            rows, columns, scale_rows = matrices[name]
            stack = (self.experts,) if ".experts." in name else ()
            return (*stack, rows, columns), (*stack, scale_rows, columns)
        if name == "block_sparse_moe.gate":
            return (hidden, self.experts), None
        return ((self.vocab, hidden) if name == "model.embed_tokens" else (hidden,)), None


def inspect_ckpt0(source: Path, config: Mapping[str, Any] | None = None) -> Ckpt0:
    """Check every file of the folder `source` but the numbers in its arrays.

    config: fields of xAI's run.py; what it says of sizes is checked, what the files do not tell is taken from it, or
    from the released model. Raises CheckpointError naming the file that is missing, damaged or in another's place.
    """
    fields = {**RELEASED, **(config or {})}
    files = [inspect_file(path) for path in tensor_paths(source)]
    sizes = _sizes(files, fields)
    outer, rest = tuple(files[:2]), files[2:]
    for name, file in zip(OUTER_FILES, outer, strict=True):
        _check(file, name, f"{name}.weight", sizes)
    per_layer = len(LAYER_FILES)
    layers: dict[int, tuple[TensorFile, ...]] = {}
    for place, layer in enumerate(sorted(range(len(rest) // per_layer), key=str)):
        layers[layer] = tuple(rest[per_layer * place : per_layer * (place + 1)])
        for name, file in zip(LAYER_FILES, layers[layer], strict=True):
            _check(file, name, f"{name} of layer {layer}", sizes)
    _check_number_of_layers(source, len(layers), sizes, fields)
    return Ckpt0(
        outer, tuple(layers[layer] for layer in range(len(layers))), converted_config(sizes, len(layers), fields)
    )


def tensor_paths(source: Path) -> list[Path]:
    """The files of a complete ckpt-0, in order. Raises CheckpointError naming the first that is missing or too many."""
    names = sorted(path.name for path in source.glob("tensor*")) if source.is_dir() else []
    if not names:
        raise CheckpointError(f"{source} has no files tensor00000_000, ..: give the folder ckpt-0 of Grok-1")
    strange = [name for name in names if not (match := _FILE_NAME.fullmatch(name)) or match[2] != "000"]
    if strange:
        raise CheckpointError(f"{source / strange[0]} is no file of ckpt-0; its files are tensor00000_000 and so on")
    wanted = [f"tensor{number:05d}_000" for number in range(len(names))]
    missing = next((name for name in wanted if name not in set(names)), None)
    if missing is not None:
        raise CheckpointError(f"{source / missing} is missing, though {names[-1]} is there. Download it.")
    if len(names) < 2 + len(LAYER_FILES) or (len(names) - 2) % len(LAYER_FILES):
        raise CheckpointError(
            f"{source} has {len(names)} tensor files, not 2 + {len(LAYER_FILES)} per layer; "
            f"tensor{len(names):05d}_000 is missing. Download the rest."
        )
    return [source / name for name in wanted]


def _sizes(files: list[TensorFile], fields: Mapping[str, Any]) -> Ckpt0Sizes:
    """The model's sizes as most files have them, so that a misplaced one is told from the others; or as configured."""
    if len(files[0].values.shape) != 2:
        raise CheckpointError(_misplaced(files[0], OUTER_FILES[0], "2 dimensions"))
    kinds = {
        name: [file for file in files[2 + place :: len(LAYER_FILES)] if _could_be(file, name)]
        for place, name in enumerate(LAYER_FILES)
        if not name.endswith("_norm")
    }
    up, down, gate_up, keys, out, queries, values, gate = kinds.values()
    flat = [file for file in files if len(file.values.shape) == 1]
    hidden = _most_common(_extents(flat, 0), files[0].values.shape[1])
    stacks = [file.values.shape for file in files if len(file.values.shape) == 3]
    found = Ckpt0Sizes(
        vocab=files[0].values.shape[0],
        hidden=hidden,
        experts=_most_common(_extents([*up, *down, *gate_up], 0) + _extents(gate, 1)),
        ffn=_most_common([next((size for size in shape[1:] if size != hidden), hidden) for shape in stacks]),
        # Undecided where two files of one layer were swapped: there are as many query heads as key heads, or more.
        query=_most_common(sorted(_extents(queries, 1) + _extents(out, 0), reverse=True)),
        key=_most_common(sorted(_extents(keys, 1) + _extents(values, 1))),
        shards=_most_common([file.scales.shape[-2] for file in (*down, *out) if file.scales is not None]),
    )
    return dataclasses.replace(found, **_stated_sizes(found.hidden, fields))


def _stated_sizes(hidden: int, fields: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that the configuration gives."""
    head = int(fields["key_size"])
    stated = {
        "vocab": fields.get("vocab_size"),
        "hidden": fields.get("emb_size"),
        "experts": fields.get("num_experts"),
        "query": fields["num_q_heads"] * head if "num_q_heads" in fields else None,
        "key": fields["num_kv_heads"] * head if "num_kv_heads" in fields else None,
        "ffn": grok1_ffn_size(fields.get("emb_size", hidden), fields["widening_factor"])
        if "widening_factor" in fields
        else None,
    }
    return {name: int(size) for name, size in stated.items() if size is not None}


def _could_be(file: TensorFile, name: str) -> bool:
    """Whether a matrix has the dimensions, and the scales or none, that its name calls for."""
    num_dimensions = 3 if ".experts." in name else 2
    return len(file.values.shape) == num_dimensions and (file.scales is None) == name.endswith(".gate")


def _extents(files: list[TensorFile], dimension: int) -> list[int]:
    return [file.values.shape[dimension] for file in files]


def _most_common(sizes: list[int], default: int = 1) -> int:
    """The size with most votes, the first among equals."""
    return Counter(sizes).most_common(1)[0][0] if sizes else default


def _check(file: TensorFile, name: str, what: str, sizes: Ckpt0Sizes) -> None:
    shape, scales = sizes.expected(name)
    found = file.scales.shape if file.scales is not None else None
    if (file.values.shape, found) != (shape, scales):
        quantised = f" with scales {list(scales)}" if scales is not None else ""
        raise CheckpointError(_misplaced(file, what, f"{'I8' if scales else 'F32'} {list(shape)}{quantised}"))


def _misplaced(file: TensorFile, what: str, expected: str) -> str:
    scales = f" with scales {list(file.scales.shape)}" if file.scales is not None else ""
    return (
        f"{file.path} holds {file.values}{scales}, but its place is that of {what}, which has {expected}: "
        "is it another file under this name, or a model of another shape (then give its config)?"
    )


def _check_number_of_layers(source: Path, found: int, sizes: Ckpt0Sizes, fields: Mapping[str, Any]) -> None:
    is_released = (sizes.vocab, sizes.hidden) == _RELEASED_VOCAB_AND_HIDDEN
    expected = fields.get("num_layers", _RELEASED_LAYERS if is_released else found)
    if found != expected:
        first = 2 + found * len(LAYER_FILES)
        raise CheckpointError(
            f"{source} has {found} layers, not {expected}: tensor{first:05d}_000 and what follows it "
            f"{'is missing' if found < expected else 'is too much'}. "
            "If the model has another number of layers, give it as num_layers in a config."
        )
    head = int(fields["key_size"])
    if sizes.query % head or sizes.key % head or sizes.query % sizes.key:
        raise CheckpointError(
            f"{source} has queries of {sizes.query} and keys of {sizes.key} values, which are no heads of {head}. "
            "If the model has heads of another size, give it as key_size in a config."
        )


def converted_config(sizes: Ckpt0Sizes, num_layers: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the converted model; `fields` are those of RELEASED, or others in their place."""
    head_dim = int(fields["key_size"])
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "grok-1",
        "torch_dtype": "bfloat16",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": sizes.query // head_dim,
        "num_key_value_heads": sizes.key // head_dim,
        "head_dim": head_dim,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": fields["num_selected_experts"],
        "max_position_embeddings": fields["sequence_len"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attn_logit_softcapping": GROK1_ATTENTION_CAP,
        "attn_output_multiplier": fields["attn_output_multiplier"],
        "embedding_multiplier_scale": fields["embedding_multiplier_scale"],
        "output_multiplier_scale": fields["output_multiplier_scale"],
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
