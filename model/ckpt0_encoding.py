"""Encodes one file of Grok-1's ckpt-0: the opcodes that xAI's pickler wrote, byte for byte, around any numbers.

No object is pickled and numpy is not asked: its newer versions name their modules otherwise, and an array of 1.6 GB
would have to be in memory. (Opcodes and frames: CPython Lib/pickle.py; states: numpy's ndarray.__reduce__ and
dtype.__reduce__. model/ckpt0_pickle.py reads them.)
"""

import math
import pickle
import struct
from dataclasses import dataclass

from model.ckpt0_pickle import ITEM_BYTES

_UNFRAMED_BYTES = 64 << 10  # such arrays stand between two frames
_LEAST_FRAME_BYTES = 4
# dtype -> byte order, and the last three values of dtype.__reduce__: item size, alignment, flags
_DTYPE_STATES = {"I8": ("|", -1, -1, 0), "F32": ("<", -1, -1, 0), "BF16": ("<", 2, 2, 64)}
_TUPLES = {1: pickle.TUPLE1, 2: pickle.TUPLE2, 3: pickle.TUPLE3}


@dataclass(frozen=True)
class ArraySpec:
    """Where an array's bytes belong, little-endian in C order: dtype "I8", "BF16" or "F32", one to three dimensions."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Part = bytes | ArraySpec


def float_parts(shape: tuple[int, ...]) -> list[Part]:
    """The file of a float32 array: bytes to write, and where its numbers go between them."""
    encoder = _Encoder()
    encoder.array(ArraySpec("F32", shape))
    return encoder.finish()


def quantised_parts(shape: tuple[int, ...], scales_shape: tuple[int, ...]) -> list[Part]:
    """The file of a QuantizedWeight8bit: int8 weights, then bfloat16 scales."""
    encoder = _Encoder()
    encoder.name("__main__", "QuantizedWeight8bit")
    encoder.put(pickle.EMPTY_TUPLE)
    encoder.new(pickle.NEWOBJ)
    encoder.new(pickle.EMPTY_DICT)
    encoder.put(pickle.MARK)
    encoder.text("weight")
    encoder.array(ArraySpec("I8", shape))
    encoder.text("scales")
    encoder.array(ArraySpec("BF16", scales_shape))
    encoder.put(pickle.SETITEMS, pickle.BUILD)
    return encoder.finish()


def part_bytes(part: Part) -> int:
    """How many bytes of the file it takes."""
    return len(part) if isinstance(part, bytes) else part.num_bytes


class _Encoder:
    """A pickler of protocol 4 with the opcodes of arrays only; it remembers texts and names, as CPython's does."""

    def __init__(self) -> None:
        self._parts: list[Part] = [pickle.PROTO + b"\x04"]
        self._frame: list[Part] = []
        self._memo: dict[object, int] = {}
        self._num_memoized = 0

    def put(self, *opcodes: bytes) -> None:
        self._frame.extend(opcodes)

    def new(self, *opcodes: bytes) -> None:
        """Something that a pickler remembers, though nothing recalls it."""
        self.put(*opcodes, pickle.MEMOIZE)
        self._num_memoized += 1

    def text(self, text: str) -> None:
        data = text.encode()
        if not self._recall(text):
            self.new(pickle.SHORT_BINUNICODE, bytes([len(data)]), data)
            self._memo[text] = self._num_memoized - 1

    def name(self, module: str, name: str) -> None:
        if not self._recall((module, name)):
            self.text(module)
            self.text(name)
            self.new(pickle.STACK_GLOBAL)
            self._memo[module, name] = self._num_memoized - 1

    def array(self, array: ArraySpec) -> None:
        self.name("numpy.core.multiarray", "_reconstruct")
        self.name("numpy", "ndarray")
        self.new(_integer(0), pickle.TUPLE1)
        if not self._recall(b"b"):
            self.new(pickle.SHORT_BINBYTES, b"\x01b")
            self._memo[b"b"] = self._num_memoized - 1
        self.new(pickle.TUPLE3)
        self.new(pickle.REDUCE)
        self.put(pickle.MARK, _integer(1), *map(_integer, array.shape))
        self.new(_TUPLES[len(array.shape)])
        self._dtype(array.dtype)
        self.put(pickle.NEWFALSE)
        self._data(array)
        self.new(pickle.TUPLE)
        self.put(pickle.BUILD)

    def finish(self) -> list[Part]:
        self.put(pickle.STOP)
        self._close_frame()
        return self._parts

    def _recall(self, key: object) -> bool:
        if key not in self._memo:
            return False
        self.put(pickle.BINGET, bytes([self._memo[key]]))
        return True

    def _dtype(self, dtype: str) -> None:
        self.name("numpy", "dtype")
        if dtype == "BF16":
            self.name("ml_dtypes", "bfloat16")
        else:
            self.text({"I8": "i1", "F32": "f4"}[dtype])
        self.new(pickle.NEWFALSE, pickle.NEWTRUE, pickle.TUPLE3)
        self.new(pickle.REDUCE)
        order, *numbers = _DTYPE_STATES[dtype]
        self.put(pickle.MARK, _integer(3))
        self.text(order)
        self.put(pickle.NONE * 3, *map(_integer, numbers))
        self.new(pickle.TUPLE)
        self.put(pickle.BUILD)

    def _data(self, array: ArraySpec) -> None:
        header = _bytes_header(array.num_bytes)
        if array.num_bytes < _UNFRAMED_BYTES:
            self._frame += [header, array]
        else:
            self._close_frame()
            self._parts += [header, array]
        self.new()

    def _close_frame(self) -> None:
        length = sum(map(part_bytes, self._frame))
        if length >= _LEAST_FRAME_BYTES:
            self._parts.append(pickle.FRAME + struct.pack("<Q", length))
        self._parts += self._frame
        self._frame = []


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return pickle.BININT1 + bytes([value])
    if 0 <= value < 1 << 16:
        return pickle.BININT2 + struct.pack("<H", value)
    return pickle.BININT + struct.pack("<i", value)


def _bytes_header(length: int) -> bytes:
    if length < 1 << 8:
        return pickle.SHORT_BINBYTES + bytes([length])
    if length < 1 << 32:
        return pickle.BINBYTES + struct.pack("<I", length)
    return pickle.BINBYTES8 + struct.pack("<Q", length)
