"""Grok-1 as released (the ckpt-0 folder of xai-org/grok-1) -> safetensors with the names of xai-org/grok-2.

ckpt-0 is one pickle per tensor, in the order of JAX's sorted tree (layers in string order: 0, 1, 10, 11, .., 2, 20):
file 0 embeddings, file 1 final norm, then twelve per layer (_LAYER_FILES). Quantised tensors are int8 with bfloat16
scales; row-parallel ones have one row of scales for each of xAI's model shards. Pickles are read with a whitelist of
five names that can build nothing but such arrays; anything else in a file is refused.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.grok_spec import ARCHITECTURE, GROK1_ATTENTION_CAP, GROK1_EMBEDDING_MULTIPLIER, GROK1_OUTPUT_MULTIPLIER

FILES_PER_LAYER = 12
# In file order. Matrices are [in, out] on disk and [out, in] in safetensors.
_LAYER_FILES = (
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
RELEASED = {
    "key_size": 128,
    "attn_output_multiplier": 0.08838834764831845,
    "embedding_multiplier_scale": GROK1_EMBEDDING_MULTIPLIER,
    "output_multiplier_scale": GROK1_OUTPUT_MULTIPLIER,
    "sequence_len": 8192,
    "num_selected_experts": 2,
}


class CheckpointError(ValueError):
    """A file of ckpt-0 is not what the layout says, or holds something a checkpoint has no use for."""


class _QuantizedWeight:
    """Stands for __main__.QuantizedWeight8bit; the pickle sets the two attributes."""

    weight: np.ndarray
    scales: np.ndarray


class _BFloat16:
    """Stands for ml_dtypes.bfloat16, whose arrays are read as their 16-bit patterns."""


def _dtype(spec: Any, *_: Any) -> np.dtype:
    if spec is _BFloat16:
        return np.dtype("<u2", copy=True)  # type: ignore[call-overload]
    if spec not in ("i1", "f4"):
        raise CheckpointError(f"array of type {spec!r} in a checkpoint file")
    return np.dtype(spec, copy=True)  # type: ignore[call-overload]


def _reconstruct(subtype: Any, shape: Any, code: Any) -> np.ndarray:
    if subtype is not np.ndarray:
        raise CheckpointError(f"an array of class {subtype!r} in a checkpoint file")
    return np.ndarray.__new__(np.ndarray, (0,), "b")


class _Unpickler(pickle.Unpickler):
    _ALLOWED: ClassVar = {
        ("__main__", "QuantizedWeight8bit"): _QuantizedWeight,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _dtype,
        ("ml_dtypes", "bfloat16"): _BFloat16,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise CheckpointError(f"the checkpoint file asks for {module}.{name}") from None


def read_tensor(path: Path, exact: bool = False) -> Tensor:
    """One file as float32 values of its own shape.

    A quantised tensor is int8 * scale, the product rounded to bfloat16 as xAI's code does; exact=True keeps the float32
    product. Raises CheckpointError, or pickle.UnpicklingError for a file that is no pickle.
    """
    with path.open("rb") as file:
        value = _Unpickler(file).load()
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return torch.from_numpy(value.copy())
    if not isinstance(value, _QuantizedWeight) or set(vars(value)) != {"weight", "scales"}:
        raise CheckpointError(f"{path.name} holds {type(value).__name__}, no float32 array and no quantised weight")
    if value.weight.dtype != np.int8 or value.scales.dtype != np.uint16:
        raise CheckpointError(f"{path.name} has {value.weight.dtype} weights and {value.scales.dtype} scales")
    weight = torch.from_numpy(value.weight.copy())
    scales = torch.from_numpy(value.scales.view(np.int16).copy()).view(torch.bfloat16)
    rows, num_scale_rows = weight.shape[-2], scales.shape[-2]
    if rows % num_scale_rows or weight.shape[-1] != scales.shape[-1]:
        raise CheckpointError(f"{path.name} has weights {tuple(weight.shape)} and scales {tuple(scales.shape)}")
    scales = scales.repeat_interleave(rows // num_scale_rows, dim=-2)
    product = weight.float() * scales.float()
    return product if exact else product.bfloat16().float()


def convert_ckpt0(
    src: str | Path, dst: str | Path, exact: bool = False, config: Mapping[str, Any] | None = None
) -> None:
    """Write ckpt-0 folder `src` as the Hugging Face model folder `dst`, one safetensors file per layer.

    config: fields of xAI's run.py that the files do not tell (key_size, the multipliers, sequence_len,
    num_selected_experts); those of the released model where it lacks them. exact: see read_tensor; such weights are
    stored as float32, the others as bfloat16 (norms, gate and embeddings are float32 in both, as in ckpt-0).
    """
    source, target = Path(src), Path(dst)
    fields = RELEASED | dict(config or {})
    files = sorted(source.glob("tensor*_000"))
    num_layers, rest = divmod(len(files) - 2, FILES_PER_LAYER)
    if rest or num_layers < 1:
        raise CheckpointError(f"{source} has {len(files)} tensor files, not 2 + {FILES_PER_LAYER} per layer")
    target.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    embeddings = read_tensor(files[0])
    write(
        "model-common.safetensors",
        {"model.embed_tokens.weight": embeddings, "model.norm.weight": read_tensor(files[1])},
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for place, layer in enumerate(sorted(str(number) for number in range(num_layers))):
        first = 2 + FILES_PER_LAYER * place
        tensors = dict(_layer_tensors(files[first : first + FILES_PER_LAYER], f"model.layers.{layer}.", exact))
        write(f"model-layer-{int(layer):05d}.safetensors", tensors)
        shapes = {name.removeprefix(f"model.layers.{layer}."): tuple(tensor.shape) for name, tensor in tensors.items()}
    index = {"metadata": {}, "weight_map": weight_map}
    _write_json(target / "model.safetensors.index.json", index)
    _write_json(target / "config.json", _config(fields, tuple(embeddings.shape), num_layers, shapes))


def _layer_tensors(files: list[Path], prefix: str, exact: bool) -> Iterator[tuple[str, Tensor]]:
    for name, path in zip(_LAYER_FILES, files, strict=True):
        tensor = read_tensor(path, exact)
        if tensor.ndim == 1 or name.endswith(".gate"):
            yield f"{prefix}{name}.weight", tensor.T if tensor.ndim == 2 else tensor
            continue
        tensor = tensor.transpose(-1, -2) if exact else tensor.transpose(-1, -2).bfloat16()
        if tensor.ndim == 2:
            yield f"{prefix}{name}.weight", tensor
            continue
        stem, which = name.rsplit(".", 1)
        for expert in range(tensor.shape[0]):
            yield f"{prefix}{stem}.{expert}.{which}.weight", tensor[expert]


def _config(
    fields: Mapping[str, Any], embeddings: tuple[int, ...], num_layers: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    vocab_size, hidden_size = embeddings
    head_dim = fields["key_size"]
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "grok-1",
        "torch_dtype": "bfloat16",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shapes["block_sparse_moe.experts.0.w1.weight"][0],
        "num_hidden_layers": num_layers,
        "num_attention_heads": shapes["self_attn.q_proj.weight"][0] // head_dim,
        "num_key_value_heads": shapes["self_attn.k_proj.weight"][0] // head_dim,
        "head_dim": head_dim,
        "num_local_experts": shapes["block_sparse_moe.gate.weight"][0],
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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
