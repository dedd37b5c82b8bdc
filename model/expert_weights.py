"""Which checkpoint tensors belong to routed experts, and reading only those that are wanted.

Names follow the Hugging Face convention: a routed expert's tensor has `.experts.` in its name (a shared expert's has
`.shared_expert(s).`), followed by the expert's number, or by a tensor that stacks all experts along its dimension 0.
"""

import json
import re
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch

from model.quantised import Quantised
from model.tensor_sets import tensor_sets

_EXPERT = re.compile(r"(?:^|\.)experts\.")
_EXPERT_NUMBER = re.compile(r"((?:^|.*\.)experts\.)(\d+)(\..*)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


def is_expert_tensor(name: str) -> bool:
    """True when the checkpoint tensor belongs to a routed expert."""
    return _EXPERT.search(name) is not None


def expert_of(name: str) -> int | None:
    """The number of the expert that a tensor belongs to; None where a tensor has several experts, or none."""
    match = _EXPERT_NUMBER.fullmatch(name)
    return int(match[2]) if match else None


def layer_of(name: str) -> int:
    """The number of the layer in a tensor's name; 0 where it has none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else 0


def read_header(path: Path) -> dict[str, dict[str, object]]:
    """The safetensors header of `path`: tensor name -> {dtype, shape, data_offsets}; no tensor data is read.

    Raises ValueError when the file is not safetensors (format: github.com/huggingface/safetensors, README "Format").
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ValueError(f"{path} is not a complete safetensors file: its header claims {length} of {size} bytes")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if 8 + length + end != size:
        raise ValueError(f"{path} is not a complete safetensors file: it has {size} of {8 + length + end} bytes")
    return header


def moe_layer_indices(names: Iterable[str]) -> list[int]:
    """Model layers that have routed experts, ascending; the position in this list is the MoE-layer ordinal."""
    found = {int(match[1]) for name in names if is_expert_tensor(name) and (match := _LAYER.search(name))}
    return sorted(found)


def dense_weights(files: Iterable[str | Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that is no routed expert's; experts' bytes are not read from disk.

    Tensors cut for tensor parallelism (model/tp_shards.py) come whole. Raises CheckpointError when parts are missing.
    """
    for tensors in tensor_sets(files):
        for name in tensors.names:
            if not is_expert_tensor(name):
                yield name, tensors.tensor(name)


def whole_weights(files: Iterable[str | Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, as a plain and whole one."""
    for tensors in tensor_sets(files):
        for name in tensors.names:
            yield name, tensors.tensor(name)


def hosted_weights(
    files: Iterable[str | Path], experts: Collection[int], num_experts: int, as_stored: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the given experts, renumbered 0..len(experts)-1 in the order of `experts`; nothing else is read.

    A stacked tensor (first dimension a multiple of num_experts) is sliced on disk: only the wanted rows are read.
    Tensors cut for tensor parallelism come whole, integers with scales (model/quantised.py) as plain weights, or with
    `as_stored` as the three tensors that they are.
    """
    local_of = {expert: local for local, expert in enumerate(experts)}
    for tensors in tensor_sets(files):
        read_as_stored = as_stored and tensors.format is not None
        for name in tensors.stored_names if read_as_stored else tensors.names:
            if not is_expert_tensor(name):
                continue
            match = _EXPERT_NUMBER.fullmatch(name)
            if match is None:
                yield name, tensors.stacked_rows(name, list(experts), num_experts)
            elif int(match[2]) in local_of:
                tensor = tensors.stored(name) if read_as_stored else tensors.tensor(name)
                yield f"{match[1]}{local_of[int(match[2])]}{match[3]}", tensor


def hosted_integers(
    files: Iterable[str | Path], layers: Collection[int], experts: Collection[int]
) -> Iterator[tuple[int, int, str, Quantised]]:
    """(layer, expert's place in `experts`, name of the matrix, the matrix) of integer experts; nothing else is read.

    layers: as in tensor names. The name is that of the projection: w1, gate_proj, ..
    """
    local_of = {expert: local for local, expert in enumerate(experts)}
    for tensors in tensor_sets(files):
        for name in tensors.names:
            match, layer = _EXPERT_NUMBER.fullmatch(name), _LAYER.search(name)
            if match is None or layer is None or int(match[2]) not in local_of or int(layer[1]) not in layers:
                continue
            projection = match[3].removeprefix(".").removesuffix(".weight")
            yield int(layer[1]), local_of[int(match[2])], projection, tensors.quantised(name)
