"""Experts kept as Grok-1's int8 weights and bfloat16 scales: how they are stored, and made into plain weights.

A file says so in its safetensors metadata (METADATA_KEY), and each expert matrix is two tensors:
    <expert>.w1.weight        int8 [out, in]         the released numbers, transposed
    <expert>.w1.weight_scale  bfloat16 [out, groups] group g scales the inputs g * in / groups .. (g + 1) * in / groups
vLLM has no kernel for that on the CPU (weight-only int8 experts), so they become plain weights while they are loaded.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cluster.errors import CheckpointError

METADATA_KEY = "switchyard_quantization"
SCALE_SUFFIX = "_scale"
# What the product of weight and scale is rounded to: xAI's own code rounds to bfloat16, "float32" keeps it exact.
PRODUCTS = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_PREFIX = "int8-"
_BLOCK_BYTES = 64 << 20  # of float32 products at a time


def metadata_value(product: str) -> str:
    """The value of METADATA_KEY for a file whose weights shall become `product` ("bfloat16" or "float32")."""
    return _PREFIX + product


def product_dtype(metadata: Mapping[str, str] | None, file: str) -> torch.dtype | None:
    """What a file's int8 experts become; None for a file of plain weights. Raises CheckpointError if it is unknown."""
    value = (metadata or {}).get(METADATA_KEY)
    if value is None:
        return None
    if value.removeprefix(_PREFIX) not in PRODUCTS:
        raise CheckpointError(f"{file} is quantised as {value!r}, which this version cannot read. Convert it again.")
    return PRODUCTS[value.removeprefix(_PREFIX)]


def loaded_bytes_per_stored(path: Path) -> int:
    """How many bytes a worker needs for each int8 weight of a safetensors file; 1 for a file without such experts."""
    with safe_open(str(path), framework="pt") as file:
        product = product_dtype(file.metadata(), str(path))
    return product.itemsize if product is not None else 1


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
