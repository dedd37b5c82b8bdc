"""The small C libraries of cluster/ and model/, loaded with ctypes; what uses them has a way without."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

_ROOT = Path(__file__).parents[1]


@functools.cache
def library(package: str = "cluster") -> ctypes.CDLL | None:
    """<package>._native, built when Switchyard was installed; None where there was no C compiler."""
    path = next((_ROOT / package).glob("_native*.so"), None)
    return ctypes.CDLL(str(path)) if path is not None else None
