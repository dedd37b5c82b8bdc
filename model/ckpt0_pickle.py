"""Reads the structure of one file of Grok-1's ckpt-0 without unpickling it.

Such a file is a pickle of protocol 4 that holds a float32 array, or a QuantizedWeight8bit with int8 `weight` and
bfloat16 `scales`. Python's unpickler would build whatever the file asks for; the machine here knows the few opcodes
that such a pickle needs, and its values are descriptions: a name is a pair of strings, an array is a place in the file.
No object is made, nothing is called, and no array data is read, so a file can neither run code nor claim more memory
than it has bytes. (Opcodes: CPython Lib/pickletools.py; states: numpy's ndarray.__reduce__ and dtype.__reduce__.)
"""

import math
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

from cluster.errors import CheckpointError

ITEM_BYTES = {"I8": 1, "BF16": 2, "F32": 4}

_PROTOCOL = b"\x80\x04"
_MAX_OPCODES = 1000  # a quantised weight takes about 100
_MAX_DIMENSIONS = 3

ALLOWED_NAMES = frozenset(
    {
        ("__main__", "QuantizedWeight8bit"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("ml_dtypes", "bfloat16"),
    }
)
# What a pickler remembers as soon as it has made it.
_MEMOIZED = frozenset(
    (
        pickle.SHORT_BINUNICODE,
        pickle.SHORT_BINBYTES,
        pickle.BINBYTES,
        pickle.BINBYTES8,
        pickle.STACK_GLOBAL,
        pickle.EMPTY_DICT,
        pickle.TUPLE1,
        pickle.TUPLE2,
        pickle.TUPLE3,
        pickle.TUPLE,
        pickle.REDUCE,
        pickle.NEWOBJ,
    )
)


@dataclass(frozen=True)
class ArrayPlace:
    """An array's bytes, `offset` in the file, little-endian; dtype "I8", "BF16" or "F32" as in safetensors."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    is_fortran: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class TensorFile:
    """One file: float32 `values`, or int8 `values` with bfloat16 `scales`."""

    path: Path
    num_bytes: int
    values: ArrayPlace
    scales: ArrayPlace | None


def inspect_file(path: Path) -> TensorFile:
    """Where `path` keeps its arrays. Raises CheckpointError, naming the file, for anything that is no such pickle."""
    try:
        if not path.is_file():  # a named pipe would be waited for
            raise CheckpointError(f"{path} is missing, or no regular file")
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            values, scales = _Machine(file, num_bytes).run()
    except _Refused as error:
        raise CheckpointError(f"{path} is no file of a Grok-1 checkpoint: {error}. Download it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return TensorFile(path, num_bytes, values, scales)


class _Refused(Exception):
    """What is wrong with the pickle; inspect_file adds the file's name."""


class _Mark:
    """The stack's MARK."""


@dataclass(frozen=True)
class _Bytes:
    """Raw bytes that stay in the file."""

    offset: int
    num_bytes: int


@dataclass(frozen=True)
class _Name:
    """What STACK_GLOBAL would import."""

    module: str
    name: str


@dataclass
class _Dtype:
    kind: str
    is_complete: bool = False


@dataclass
class _Array:
    place: ArrayPlace | None = None


@dataclass
class _Quantised:
    parts: dict[str, ArrayPlace] = field(default_factory=dict)


def _refuse(reason: str) -> NoReturn:
    raise _Refused(reason)


class _Machine:
    """The pickle machine with opcodes and values of array files only."""

    def __init__(self, file: BinaryIO, num_bytes: int):
        self._file = file
        self._num_bytes = num_bytes
        self._stack: list[Any] = []
        self._memo: list[Any] = []
        self._last_opcode = b""
        self._frame_end = 0

    def run(self) -> tuple[ArrayPlace, ArrayPlace | None]:
        """(values, scales) of the object that the pickle describes."""
        if self._take(2) != _PROTOCOL:
            _refuse("it does not start as a pickle of protocol 4")
        for _ in range(_MAX_OPCODES):
            opcode = self._take(1)
            if opcode == pickle.STOP:
                return self._result()
            step = self._STEPS.get(opcode)
            if step is None:
                _refuse(f"it has opcode 0x{opcode.hex()} at byte {self._file.tell() - 1}, which no array needs")
            step(self)
            if opcode != pickle.FRAME:  # one begins between a large array and its memo
                self._last_opcode = opcode
        _refuse(f"it has more than {_MAX_OPCODES} opcodes")

    def _result(self) -> tuple[ArrayPlace, ArrayPlace | None]:
        value = self._pop()
        rest = self._num_bytes - self._file.tell()
        if self._stack or rest:
            _refuse(f"something follows the tensor ({rest} bytes, {len(self._stack)} objects)")
        if isinstance(value, _Array) and value.place is not None and value.place.dtype == "F32":
            return value.place, None
        if isinstance(value, _Quantised) and value.parts:
            return value.parts["weight"], value.parts["scales"]
        _refuse("it holds neither a float32 array nor a quantised weight")

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            _refuse(f"it ends at byte {self._num_bytes}, in the middle of its tensor")
        return data

    def _number(self, layout: str) -> int:
        return int(struct.unpack(layout, self._take(struct.calcsize(layout)))[0])

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _Mark:
            _refuse(f"an operand is missing at byte {self._file.tell()}")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack and self._stack[-1] is not _Mark:
            items.append(self._stack.pop())
        if not self._stack:
            _refuse(f"a mark is missing at byte {self._file.tell()}")
        self._stack.pop()
        return items[::-1]

    def _frame(self) -> None:
        if self._file.tell() <= self._frame_end:
            _refuse(f"it has a frame within a frame at byte {self._file.tell() - 1}")
        length = self._number("<Q")
        rest = self._num_bytes - self._file.tell()
        if length > rest:
            _refuse(f"it is cut off: {length} bytes are announced where {rest} are left")
        self._frame_end = self._file.tell() + length

    def _text(self) -> None:
        data = self._take(self._number("<B"))
        if not data.isascii():
            _refuse(f"it holds text that no array needs at byte {self._file.tell()}")
        self._stack.append(data.decode("ascii"))

    def _bytes(self, layout: str) -> None:
        length = self._number(layout)
        offset = self._file.tell()
        if length > self._num_bytes - offset:
            _refuse(f"it is cut off: an array of {length} bytes, of which {self._num_bytes - offset} are there")
        self._stack.append(_Bytes(offset, length))
        self._file.seek(length, 1)

    def _tuple(self, count: int) -> None:
        self._stack.append(tuple(self._pop() for _ in range(count))[::-1])

    def _recall(self) -> None:
        place = self._number("<B")
        if place >= len(self._memo):
            _refuse(f"it refers to something it has not said at byte {self._file.tell()}")
        self._stack.append(self._memo[place])

    def _memoize(self) -> None:
        if self._last_opcode not in _MEMOIZED:
            _refuse(f"it remembers something that is not new at byte {self._file.tell() - 1}")
        value = self._pop()
        self._memo.append(value)
        self._stack.append(value)

    def _global(self) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            _refuse("it asks for something without a name")
        if (module, name) not in ALLOWED_NAMES:
            _refuse(f"it asks for {module}.{name}")
        self._stack.append(_Name(module, name))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        match function, arguments:
            case _Name("numpy.core.multiarray"), (_Name("numpy", "ndarray"), (0,), _Bytes(num_bytes=1)):
                self._stack.append(_Array())
            case _Name("numpy", "dtype"), ("i1" | "f4" as kind, False, True):
                self._stack.append(_Dtype("I8" if kind == "i1" else "F32"))
            case _Name("numpy", "dtype"), (_Name("ml_dtypes"), False, True):
                self._stack.append(_Dtype("BF16"))
            case _Name("numpy", "dtype"), (str(kind), *_):
                _refuse(f"it has an array of type {kind[:20]!r}")
            case _:
                _refuse(f"it makes a call that no array needs at byte {self._file.tell()}")

    def _new(self) -> None:
        arguments, cls = self._pop(), self._pop()
        if not (isinstance(cls, _Name) and cls.module == "__main__" and arguments == ()):
            _refuse(f"it makes an object that no array needs at byte {self._file.tell()}")
        self._stack.append(_Quantised())

    def _set_items(self) -> None:
        items, target = self._pop_to_mark(), self._pop()
        keys = items[::2]
        if not isinstance(target, dict) or target or len(items) != 4 or not all(isinstance(key, str) for key in keys):
            _refuse(f"it fills something that is no dictionary of arrays at byte {self._file.tell()}")
        target.update(zip(keys, items[1::2], strict=True))
        self._stack.append(target)

    def _build(self) -> None:
        state, target = self._pop(), self._pop()
        match target, state:
            case _Dtype(is_complete=False), (3, str(order), None, None, None, int(), int(), int()):
                if order != ("|" if target.kind == "I8" else "<"):
                    _refuse(f"its numbers have byte order {order[:5]!r}")
                target.is_complete = True
            case _Array(place=None), (
                1,
                tuple(shape),
                _Dtype(is_complete=True) as dtype,
                bool(fortran),
                _Bytes() as data,
            ):
                target.place = _place(dtype.kind, shape, fortran, data)
            case _Quantised(), {"weight": _Array() as weight, "scales": _Array() as scales} if not target.parts:
                target.parts = _quantised_parts(weight.place, scales.place)
            case _:
                _refuse(f"it sets a state that no array has at byte {self._file.tell()}")
        self._stack.append(target)

    _STEPS: ClassVar[dict[bytes, Callable[["_Machine"], None]]] = {
        pickle.FRAME: _frame,
        pickle.SHORT_BINUNICODE: _text,
        pickle.SHORT_BINBYTES: lambda self: self._bytes("<B"),
        pickle.BINBYTES: lambda self: self._bytes("<I"),
        pickle.BINBYTES8: lambda self: self._bytes("<Q"),
        pickle.BININT1: lambda self: self._stack.append(self._number("<B")),
        pickle.BININT2: lambda self: self._stack.append(self._number("<H")),
        pickle.BININT: lambda self: self._stack.append(self._number("<i")),
        pickle.NONE: lambda self: self._stack.append(None),
        pickle.NEWTRUE: lambda self: self._stack.append(True),
        pickle.NEWFALSE: lambda self: self._stack.append(False),
        pickle.EMPTY_DICT: lambda self: self._stack.append({}),
        pickle.EMPTY_TUPLE: lambda self: self._stack.append(()),
        pickle.TUPLE1: lambda self: self._tuple(1),
        pickle.TUPLE2: lambda self: self._tuple(2),
        pickle.TUPLE3: lambda self: self._tuple(3),
        pickle.TUPLE: lambda self: self._stack.append(tuple(self._pop_to_mark())),
        pickle.MARK: lambda self: self._stack.append(_Mark),
        pickle.MEMOIZE: _memoize,
        pickle.BINGET: _recall,
        pickle.STACK_GLOBAL: _global,
        pickle.REDUCE: _reduce,
        pickle.NEWOBJ: _new,
        pickle.SETITEMS: _set_items,
        pickle.BUILD: _build,
    }


def _place(kind: str, shape: tuple[Any, ...], fortran: bool, data: _Bytes) -> ArrayPlace:
    if not 1 <= len(shape) <= _MAX_DIMENSIONS or not all(type(size) is int and size > 0 for size in shape):
        _refuse("it has an array without a proper shape")
    place = ArrayPlace(kind, shape, data.offset, fortran)
    if place.num_bytes != data.num_bytes:
        _refuse(f"its array {place} takes {place.num_bytes} bytes, {data.num_bytes} are there")
    return place


def _quantised_parts(weight: ArrayPlace | None, scales: ArrayPlace | None) -> dict[str, ArrayPlace]:
    if weight is None or scales is None or (weight.dtype, scales.dtype) != ("I8", "BF16"):
        _refuse(f"its quantised weight is {weight} with scales {scales}, not I8 with BF16")
    rows, num_groups = (place.shape[-2] if len(place.shape) > 1 else 0 for place in (weight, scales))
    others = [place.shape[:-2] + place.shape[-1:] for place in (weight, scales)]
    if others[0] != others[1] or not num_groups or rows % num_groups:
        _refuse(f"its scales {scales} do not fit its weight {weight}")
    return {"weight": weight, "scales": scales}
