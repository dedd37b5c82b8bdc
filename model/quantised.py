"""Expert matrices stored as integers with scales: the format on disk, and the way there and back.

The format is "pack-quantized" of compressed-tensors (github.com/vllm-project/compressed-tensors), which vLLM loads for
its own kernels on a GPU. A matrix `<expert>.w1.weight` [out, in] is three tensors:
    <expert>.w1.weight_packed  int32 [out, in * bits / 32]  integers with 2^(bits-1) added, the first in the lowest bits
    <expert>.w1.weight_scale   bfloat16 [out, groups]       group g scales the inputs g * in / groups and following
    <expert>.w1.weight_shape   int64 [2]                    out, in
A file says in its safetensors metadata (METADATA_KEY) how many bits there are and what a weight is: "int8-bfloat16" is
integer * scale rounded to bfloat16, as xAI's code does; "-float32" is the exact product.

Letters: O outputs, I inputs, G groups, W int32 words of a row.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from cluster.errors import CheckpointError, ConfigError
from model.safetensors_writer import TensorEntry

Precision = Literal["int8", "int4"]

METADATA_KEY = "switchyard_quantization"
PACKED, SCALES, SHAPE = "_packed", "_scale", "_shape"
GROUP_SIZE = 128

_LEAST_GROUP = 8
_BITS = {"int8": 8, "int4": 4}
_PRODUCTS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_KNOWN = ("int8-bfloat16", "int8-float32", "int4-float32")
_BLOCK_BYTES = 64 << 20  # of float32 values at a time


@dataclass(frozen=True)
class Format:
    """How a file's expert matrices are stored: bits of an integer, and what integer * scale is rounded to."""

    bits: int
    product: torch.dtype

    @property
    def per_word(self) -> int:
        """Integers in an int32."""
        return 32 // self.bits


@dataclass(frozen=True)
class Quantised:
    """One matrix: packed_OW int32, scales_OG bfloat16."""

    format: Format
    packed_OW: Tensor  # noqa: N815
    scales_OG: Tensor  # noqa: N815


@dataclass(frozen=True)
class Storage:
    """How a conversion stores expert matrices. product: what a weight is, see METADATA_KEY.

    group: inputs that share a scale; None keeps the groups of the source, in a file that only Switchyard reads.
    """

    precision: Precision
    product: str
    group: int | None

    @property
    def bits(self) -> int:
        return _BITS[self.precision]

    @property
    def metadata(self) -> str:
        """The value of METADATA_KEY for a file."""
        return metadata_value(self.precision, self.product)

    def config(self) -> dict[str, Any]:
        """What config.json gets."""
        own = {"experts": self.precision, "scales": "bfloat16", "product": self.product}
        quantization = {} if self.group is None else {"quantization_config": vllm_config(self.precision, self.group)}
        return {METADATA_KEY: own} | quantization

    def entries(self, name: str, rows: int, columns: int, groups: int) -> tuple[TensorEntry, TensorEntry, TensorEntry]:
        """Shape, scales and integers of matrix `name`, in the order in which they are written."""
        return (
            TensorEntry(name + SHAPE, "I64", (2,)),
            TensorEntry(name + SCALES, "BF16", (rows, groups)),
            TensorEntry(name + PACKED, "I32", (rows, columns * self.bits // 32)),
        )


def common_group(sizes: Collection[int], what: str) -> int:
    """Inputs that share a scale in matrices of so many inputs: GROUP_SIZE, or the largest power of two below it.

    Raises ConfigError when not even 8 inputs fit: an int32 could not be filled.
    """
    group = min(min(GROUP_SIZE, size & -size) for size in sizes)
    if group < _LEAST_GROUP:
        raise ConfigError(
            f"{what}: experts with {', '.join(map(str, sizes))} inputs cannot be packed: not a multiple of 8."
        )
    return group


def engine_args(model: str) -> dict[str, Any]:
    """vLLM's arguments for an engine, or a worker on the CPU, that computes none of a checkpoint's packed experts.

    To vLLM the dense part is then what it is, plain: its own quantised kernels take no float32 activations.
    """
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    is_packed = METADATA_KEY in config and "quantization_config" in config
    return {"hf_overrides": {"quantization_config": None}} if is_packed else {}


def metadata_value(precision: Precision, product: str) -> str:
    """The value of METADATA_KEY for a file of such matrices; product is "bfloat16" or "float32"."""
    return f"{precision}-{product}"


def format_of(metadata: Mapping[str, str] | None, file: str) -> Format | None:
    """How a file's experts are stored; None for a file of plain weights. Raises CheckpointError if it is unknown."""
    value = (metadata or {}).get(METADATA_KEY)
    if value is None:
        return None
    precision, _, product = value.partition("-")
    if value not in _KNOWN:
        raise CheckpointError(f"{file} is quantised as {value!r}, which this version cannot read. Convert it again.")
    return Format(_BITS[precision], _PRODUCTS[product])


def file_format(path: Path) -> Format | None:
    """format_of() a safetensors file, by its header."""
    with safe_open(str(path), framework="pt") as file:
        return format_of(file.metadata(), str(path))


def vllm_config(precision: Precision, group: int) -> dict[str, Any]:
    """quantization_config of config.json: experts in groups of `group` inputs, everything else plain."""
    weights = {"num_bits": _BITS[precision], "type": "int", "symmetric": True, "strategy": "group"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": [r"re:.*\.experts\..*"],
                "weights": {**weights, "group_size": group, "dynamic": False},
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": [],
    }


def config_format(config: Mapping[str, Any], file: Path) -> Format | None:
    """How a checkpoint's experts are stored, by its config.json; None for plain weights. Raises CheckpointError."""
    own = config.get(METADATA_KEY)
    if own is None:
        return None
    value = f"{own.get('experts')}-{own.get('product')}" if isinstance(own, dict) else str(own)
    return format_of({METADATA_KEY: value}, str(file))


def logical_shapes(header: Mapping[str, Mapping[str, Any]], stored: Format | None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a safetensors header, packed matrices as the ones they stand for."""
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    if stored is None:
        return shapes
    for name in [name for name in shapes if name.endswith(PACKED)]:
        rows, words = shapes.pop(name)
        logical = name.removesuffix(PACKED)
        shapes[logical] = (rows, words * stored.per_word)
        for suffix in (SCALES, SHAPE):
            shapes.pop(logical + suffix, None)
    return shapes


def quantise(weight_OI: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """(integers int8 [O, I], scales bfloat16 [O, G]): symmetric, the nearest integer, as compressed-tensors does it.

    A group's scale is its largest magnitude over 2^(bits-1) - 1/2, so that neither end of the range is cut by more than
    half a step; integers are taken against the scale as it is stored.
    """
    rows, columns = weight_OI.shape
    integers_OI = torch.empty(rows, columns, dtype=torch.int8)
    scales_OG = torch.empty(rows, columns // group, dtype=torch.bfloat16)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    step = max(1, _BLOCK_BYTES // (4 * columns))
    for first in range(0, rows, step):
        block_BGI = weight_OI[first : first + step].float().view(-1, columns // group, group)
        scales_BG = (block_BGI.abs().amax(-1) / (high + 0.5)).to(torch.bfloat16)
        divisor_BG1 = scales_BG.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        block_BGI = (block_BGI / divisor_BG1).round_().clamp_(low, high)
        integers_OI[first : first + step] = block_BGI.view(-1, columns).to(torch.int8)
        scales_OG[first : first + step] = scales_BG
    return integers_OI, scales_OG


def pack(integers_OI: Tensor, bits: int) -> Tensor:
    """int8 [O, I] -> int32 [O, I * bits / 32]."""
    if bits == 8:
        return (integers_OI.view(torch.uint8) ^ 0x80).view(torch.int32)
    nibbles_OI = (integers_OI + 8).view(torch.uint8)
    return (nibbles_OI[:, ::2] | nibbles_OI[:, 1::2] << 4).view(torch.int32)


def unpack(packed_OW: Tensor, bits: int) -> Tensor:
    """int32 [O, W] -> int8 [O, I]."""
    bytes_OB = packed_OW.view(torch.uint8)
    if bits == 8:
        return (bytes_OB ^ 0x80).view(torch.int8)
    return torch.stack((bytes_OB & 15, bytes_OB >> 4), dim=-1).view(len(bytes_OB), -1).view(torch.int8) - 8


def plain(matrix: Quantised) -> Tensor:
    """The weights [O, I]. Raises ValueError when the scales do not fit."""
    return dequantise(unpack(matrix.packed_OW, matrix.format.bits), matrix.scales_OG, matrix.format.product)


def dequantise(weight_OI: Tensor, scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * scale [O, I], the float32 product rounded to dtype. Both factors fit bfloat16, so the product is exact.

    Source: QuantizedWeight8bit in model.py of xai-org/grok-1. Raises ValueError when the shapes do not fit.
    """
    rows, columns = weight_OI.shape
    groups = scales_OG.shape[1]
    if scales_OG.shape[0] != rows or not groups or columns % groups:
        raise ValueError(f"scales {list(scales_OG.shape)} do not fit a weight {list(weight_OI.shape)}")
    product_OI = torch.empty(rows, columns, dtype=dtype)
    step = max(1, _BLOCK_BYTES // (4 * columns))
    for first in range(0, rows, step):
        block_BGI = weight_OI[first : first + step].view(-1, groups, columns // groups).float()
        block_BGI *= scales_OG[first : first + step].float().unsqueeze(-1)
        product_OI[first : first + step] = block_BGI.view(-1, columns)
    return product_OI
