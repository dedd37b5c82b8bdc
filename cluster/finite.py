"""Whether an answer consists of numbers: a sick device often returns NaN, and one NaN spoils a sequence."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import torch

from cluster.native import library

# dtype -> (bytes of a word, mask of the exponent's bits)
_FORMATS = {torch.float32: (4, 0x7F800000), torch.bfloat16: (2, 0x7F80), torch.float16: (2, 0x7C00)}

AllFinite = Callable[[int, int], bool]


def all_finite_of(dtype: torch.dtype) -> AllFinite:
    """A function (address, count) -> whether none of `count` values of `dtype` at `address` is infinite or NaN."""
    word_bytes, exponent = _FORMATS[dtype]
    native = library()
    if native is None:
        return lambda address, count: _all_finite(address, count, word_bytes, exponent)
    word = ctypes.c_uint32 if word_bytes == 4 else ctypes.c_uint16
    function = getattr(native, f"switchyard_all_finite_{8 * word_bytes}")
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, word)
    function.restype = ctypes.c_int
    return lambda address, count: bool(function(address, count, exponent))


def _all_finite(address: int, count: int, word_bytes: int, exponent: int) -> bool:
    """The same in numpy, for machines without a C compiler."""
    if not count:
        return True
    word = ctypes.c_uint32 if word_bytes == 4 else ctypes.c_uint16
    bits = np.ctypeslib.as_array((word * count).from_address(address))
    return bool(((bits & exponent) != exponent).all())
