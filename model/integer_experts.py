"""A layer's experts computed from integers and scales as they are stored, on the CPU (model/integer_experts.c).

vLLM 0.32 has no such kernel for most CPUs: int4 needs AMX and a SiLU, and weight-only int8 is not there at all. One
stream's decoding is bound by the bytes of the experts it touches, so what is read from memory stays integer here; a
weight exists as a float only in registers. Where exact products are not asked for (bfloat16 activations, weights that
are not rounded), AVX2 multiplies the integers with activations of 16 bits: see model/integer_shorts.h.

Letters: E experts, D hidden, F inner size, T tokens, K chosen experts per token.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.native import library
from model.quantised import Format, Quantised, file_format

# vLLM's names of activations (vllm/model_executor/layers/fused_moe/activation.py) -> integer_experts.c's.
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_DTYPES = (torch.float32, torch.bfloat16)
# Columns that integer_shorts.h sums as integers: as many as share a scale, but no more than their sum has room for.
_MOST_IN_BLOCK = 256
_LEAST_IN_BLOCK = {8: 32, 4: 64}


class _Stack(ctypes.Structure):
    _fields_ = (
        ("integers", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("block", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("w13", _Stack),
        ("w2", _Stack),
        ("num_experts", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("rounds", ctypes.c_int32),
        ("activation", ctypes.c_int32),
    )


def can_compute(activation: str, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for such experts: it was built when Switchyard was installed, and knows the two."""
    return _kernel() is not None and activation in _ACTIVATIONS and dtype in _DTYPES


def loaded_bytes_per_stored(path: Path) -> int:
    """How many bytes a worker needs for each byte of packed integers in a safetensors file; 1 where there are none."""
    stored = file_format(path)
    return 1 if stored is None or _kernel() is not None else stored.product.itemsize * 8 // stored.bits


class IntegerExperts:
    """The experts of one layer. put() every matrix, then run(); memory is taken as the first matrices come.

    w1 is the gate's matrix [F, D], w3 the up projection's, w2 the one down [D, F]. dtype is that of activations,
    float32 or bfloat16.
    """

    def __init__(
        self, num_experts: int, hidden: int, inner: int, activation: str, dtype: torch.dtype, num_threads: int
    ):
        self._num_experts = num_experts
        self._rows = {"w13": 2 * inner, "w2": hidden}
        self._inner = inner
        self._activation = activation
        self._dtype = dtype
        self._num_threads = num_threads
        self._integers: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._format: Format | None = None
        self._missing = {(expert, which) for expert in range(num_experts) for which in ("w1", "w2", "w3")}
        self._blocks: dict[str, int] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @property
    def memory_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._integers.values(), *self._scales.values()))

    def put(self, expert: int, which: str, matrix: Quantised) -> None:
        """Take a matrix of expert number `expert`. Raises ValueError when it does not fit the others."""
        stack = "w2" if which == "w2" else "w13"
        scales = matrix.scales_OG
        first = self._inner if which == "w3" else 0
        rows = slice(first, first + (self._inner if stack == "w13" else self._rows["w2"]))
        if stack not in self._integers:
            size = (self._num_experts, self._rows[stack])
            self._integers[stack] = torch.empty((*size, matrix.packed_OW.shape[1] * 4), dtype=torch.uint8)
            self._scales[stack] = torch.empty((*size, scales.shape[1]), dtype=torch.bfloat16)
            self._blocks[stack] = self._block(matrix)
        self._format = self._format or matrix.format
        integers = _for_kernel(matrix, self._blocks[stack])
        places = self._integers[stack][expert, rows], self._scales[stack][expert, rows]
        if matrix.format != self._format or places[0].shape != integers.shape or places[1].shape != scales.shape:
            raise ValueError(f"{which} of expert {expert} does not fit the layer's other matrices")
        places[0].copy_(integers)
        places[1].copy_(scales)
        self._missing.discard((expert, which))

    def ready(self) -> Callable[..., None]:
        """run(out_TD, x_TD, weights_TK, ids_TK): writes each token's weighted sum over its experts into out.

        x and out have the dtype of activations, weights are float32, ids int32, -1 for an expert that is not here; all
        contiguous. Raises ValueError when a matrix has not been put.
        """
        if self._missing or self._format is None:
            expert, which = min(self._missing)
            raise ValueError(f"{which} of expert {expert} is missing")
        native, layer, threads = _kernel(), self._layer(self._format), self._num_threads
        kernel, scratch_bytes, reference = (
            native.switchyard_integer_experts,
            native.switchyard_integer_experts_scratch,
            ctypes.byref(layer),
        )
        is_bfloat16 = self._dtype == torch.bfloat16

        def run(out_TD: Tensor, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> None:
            num_tokens, top_k = ids_TK.shape
            scratch = self._scratch_of(scratch_bytes(reference, num_tokens, top_k))
            pointers = (x_TD.data_ptr(), weights_TK.data_ptr(), ids_TK.data_ptr(), out_TD.data_ptr())
            kernel(reference, *pointers, num_tokens, top_k, is_bfloat16, scratch, threads)

        return run

    def _block(self, matrix: Quantised) -> int:
        """Columns that are summed as integers; 0 where every product is computed by itself."""
        bits = matrix.format.bits
        group = matrix.packed_OW.shape[1] * 32 // bits // matrix.scales_OG.shape[1]
        block = min(group & -group, _MOST_IN_BLOCK)
        is_exact = self._dtype == torch.float32 or matrix.format.product == torch.bfloat16
        return block if not is_exact and block >= _LEAST_IN_BLOCK[bits] and _has_blocks() else 0

    def _layer(self, stored: Format) -> _Layer:
        stacks = [
            _Stack(
                self._integers[name].data_ptr(),
                self._scales[name].data_ptr(),
                self._rows[name],
                self._integers[name].shape[2] * 8 // stored.bits,
                self._integers[name].shape[2] * 8 // stored.bits // self._scales[name].shape[2],
                self._blocks[name],
            )
            for name in ("w13", "w2")
        ]
        rounds = stored.product == torch.bfloat16
        return _Layer(*stacks, self._num_experts, stored.bits, rounds, _ACTIVATIONS[self._activation])

    def _scratch_of(self, num_bytes: int) -> int:
        """The address of so much memory, kept from call to call, and grown."""
        if self._scratch.numel() < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
        return self._scratch.data_ptr()


def _for_kernel(matrix: Quantised, block: int) -> Tensor:
    """[O, I * bits / 8] uint8 as the kernel reads them: int8 signed, int4 with 8 added.

    Two int4 are a byte, the first in its lower half; with blocks they lie as integer_shorts.h says.
    """
    bytes_OB = matrix.packed_OW.view(torch.uint8)
    if matrix.format.bits == 8:
        return bytes_OB ^ 0x80
    if not block:
        return bytes_OB
    nibbles = torch.stack((bytes_OB & 15, bytes_OB >> 4), dim=-1).view(-1, 4, 16).to(torch.int16)
    words = nibbles[:, 0] | nibbles[:, 1] << 4 | nibbles[:, 2] << 8 | nibbles[:, 3] << 12
    return words.view(torch.uint8).view(bytes_OB.shape)


@functools.cache
def _has_blocks() -> bool:
    return bool(_kernel().switchyard_integer_blocks())


@functools.cache
def _kernel() -> Any:
    """The library with integer_experts.c; None where it was not built."""
    native = library("model")
    if native is None:
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    native.switchyard_integer_experts.argtypes = (
        *(pointer, pointer, pointer, pointer, pointer),
        *(count, count, ctypes.c_int, pointer, ctypes.c_int),
    )
    native.switchyard_integer_experts.restype = None
    native.switchyard_integer_experts_scratch.argtypes = (pointer, count, count)
    native.switchyard_integer_experts_scratch.restype = count
    return native
