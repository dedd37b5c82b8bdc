"""What a checkpoint says about its experts, from config.json and safetensors headers alone: no weights, no vLLM."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.errors import CheckpointError
from model.expert_weights import is_expert_tensor, moe_layer_indices, read_header
from model.grok_spec import is_grok
from model.grok_tensors import check_grok_tensors
from model.quantised import Format, config_format
from model.tp_shards import shard_sets

# The names vLLM 0.32 looks for (vllm/transformers_utils/model_arch_config_convertor.py).
_NUM_EXPERTS_KEYS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
_HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd")
_NESTED_KEYS = ("text_config", "llm_config", "language_config", "ffn_config")

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class MoeSpec:
    """The routed experts of a checkpoint. num_layers counts MoE layers; dtype is that of the activations.

    layers: their numbers in tensor names; the place here is the MoE-layer ordinal. stored: None for plain weights.
    """

    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    fingerprint: str
    dtype: torch.dtype
    layers: tuple[int, ...]
    stored: Format | None


def inspect_checkpoint(model: str, dtype: str = "auto") -> MoeSpec | None:
    """The spec of the checkpoint in folder `model`, or None for a dense model.

    Raises CheckpointError, saying what to do, when the folder is no checkpoint or its experts cannot be read.
    """
    folder = Path(model)
    config = read_config(folder)
    files = weight_files(folder)
    shard_sets(files)
    by_path = {path: read_header_or_raise(path) for path in files}
    if is_grok(config):
        check_grok_tensors(folder, config, by_path)
    headers = {path.name: header for path, header in by_path.items()}
    names = [name for header in headers.values() for name in header]
    layers = moe_layer_indices(names)
    num_experts = _first(config, _NUM_EXPERTS_KEYS)
    if not layers and not num_experts:
        return None
    top_k, hidden_size = _first(config, _TOP_K_KEYS), _first(config, _HIDDEN_KEYS)
    if not (layers and num_experts and top_k and hidden_size):
        raise CheckpointError(
            f"{folder}: cannot tell its experts. config.json gives num_experts={num_experts}, top_k={top_k}, "
            f"hidden_size={hidden_size}; {len(layers)} layers have tensors named *.experts.*. "
            "Switchyard serves safetensors checkpoints with Hugging Face names."
        )
    return MoeSpec(
        num_layers=len(layers),
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        fingerprint=_fingerprint(config, headers, dtype),
        dtype=resolve_dtype(config, dtype),
        layers=tuple(layers),
        stored=config_format(config, folder / "config.json"),
    )


def resolve_dtype(config: dict[str, Any], dtype: str) -> torch.dtype:
    """The activation dtype: `dtype`, or for "auto" what config.json names (float32 becomes bfloat16, as in vLLM)."""
    if dtype != "auto":
        return _DTYPES[dtype]
    named = _first_any(config, ("dtype", "torch_dtype")) or "bfloat16"
    return torch.float16 if named == "float16" else torch.bfloat16


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, by its index if there is one. Raises CheckpointError if there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise CheckpointError(f"{folder}: weights missing: {', '.join(missing) or 'no *.safetensors file'}")
    return files


def read_header_or_raise(path: Path) -> dict[str, dict[str, object]]:
    """read_header with its ValueError turned into CheckpointError."""
    try:
        return read_header(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises CheckpointError when there is none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the path of a checkpoint (config.json, *.safetensors)")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: give the path of a checkpoint folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def _first_any(config: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The first of `keys` that is set, in the config or in one of its nested text configs."""
    scopes = [config, *(config[key] for key in _NESTED_KEYS if isinstance(config.get(key), dict))]
    return next((scope[key] for scope in scopes for key in keys if scope.get(key)), None)


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int:
    value = _first_any(config, keys)
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else 0


def _fingerprint(config: dict[str, Any], headers: dict[str, dict[str, Any]], dtype: str) -> str:
    """Identifies config, dtype and the experts' names, shapes and places in their files; contents are not hashed."""
    experts = {
        file: {name: entry for name, entry in header.items() if is_expert_tensor(name)}
        for file, header in headers.items()
    }
    text = json.dumps([config, experts, dtype], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
