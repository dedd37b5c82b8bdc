"""The small C library beside this file, loaded with ctypes; everything that uses it has a way without it."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path


@functools.cache
def library() -> ctypes.CDLL | None:
    """cluster._native, built when Switchyard was installed; None where there was no C compiler."""
    path = next(Path(__file__).parent.glob("_native*.so"), None)
    return ctypes.CDLL(str(path)) if path is not None else None
