"""Makes folders in the format of Grok-1's ckpt-0 (its layout: model/ckpt0_layout.py), and bad files.

The encoder is written from pickle's opcodes and not with Python's pickler, so that it can write what no pickler would.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

CONFIG = {"key_size": 8, "sequence_len": 64, "attn_output_multiplier": 0.35}
VOCAB, HIDDEN, FFN, EXPERTS, QUERY, KEY, SHARDS = 10, 16, 32, 2, 24, 8, 8
LAYER_SHAPES = (
    (EXPERTS, HIDDEN, FFN),
    (EXPERTS, FFN, HIDDEN),
    (EXPERTS, HIDDEN, FFN),
    (HIDDEN, KEY),
    (QUERY, HIDDEN),
    (HIDDEN, QUERY),
    (HIDDEN, KEY),
    (HIDDEN,),
    (HIDDEN,),
    (HIDDEN,),
    (HIDDEN,),
    (HIDDEN, EXPERTS),
)
SCALE_ROWS = (1, SHARDS, 1, 1, SHARDS, 1, 1)


@dataclass
class Encoded:
    """A tensor file before it is one: change a part, then take bytes()."""

    dtype: bytes = b"i1"
    order: bytes = b"|"
    shape: tuple[int, ...] = ()
    data: bytes = b""
    scales_dtype: bytes | None = None  # None: bfloat16
    scales_shape: tuple[int, ...] = ()
    scales_data: bytes | None = None  # None: a bare array
    length: int | None = None  # announced instead of len(data)
    extra: dict[str, bytes] = field(default_factory=dict)  # opcodes at "start", "call" or "end"

    def bytes(self) -> bytes:
        array = _array(_text(self.dtype), self.order, self.shape, self.data, self.length, self.extra.get("call", b""))
        if self.scales_data is not None:
            kind = _text(self.scales_dtype) if self.scales_dtype is not None else _name(b"ml_dtypes", b"bfloat16")
            scales = _array(kind, b"<", self.scales_shape, self.scales_data)
            state = b"}\x94(" + _text(b"weight") + array + _text(b"scales") + scales + b"u"
            array = _name(b"__main__", b"QuantizedWeight8bit") + b")\x81\x94" + state + b"b"
        return b"\x80\x04" + self.extra.get("start", b"") + array + self.extra.get("end", b"") + b"."


def bfloat16_bytes(values: np.ndarray) -> bytes:
    """Positive float32 values cut to bfloat16."""
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def float_file(values: np.ndarray) -> Encoded:
    return Encoded(b"f4", b"<", values.shape, values.astype("<f4").tobytes())


def quantised_file(weight: np.ndarray, scales: np.ndarray) -> Encoded:
    return Encoded(
        shape=weight.shape, data=weight.tobytes(), scales_shape=scales.shape, scales_data=bfloat16_bytes(scales)
    )


def random_files(num_layers: int, seed: int = 0) -> list[Encoded]:
    """The files of a checkpoint of the shapes above; the norms of the n-th layer in the files are all n + 1."""
    random = np.random.default_rng(seed)
    files = [float_file(random.standard_normal((VOCAB, HIDDEN))), float_file(random.standard_normal(HIDDEN))]
    for place in range(num_layers):
        for kind, shape in enumerate(LAYER_SHAPES):
            if kind < len(SCALE_ROWS):
                weight = random.integers(-127, 128, shape, dtype=np.int8)
                scales = random.uniform(0.01, 0.02, (*shape[:-2], SCALE_ROWS[kind], shape[-1]))
                files.append(quantised_file(weight, scales))
            elif len(shape) == 1:
                files.append(float_file(np.full(shape, place + 1.0)))
            else:
                files.append(float_file(random.standard_normal(shape)))
    return files


def write(folder: Path, files: list[Encoded], change: Callable[[int, bytes], bytes] | None = None) -> Path:
    """Write the files as tensor00000_000 and so on; `change` may replace the bytes of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        data = file.bytes()
        (folder / file_name(number)).write_bytes(change(number, data) if change else data)
    return folder


def file_name(number: int) -> str:
    return f"tensor{number:05d}_000"


def _text(text: bytes) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text + b"\x94"


def _name(module: bytes, name: bytes) -> bytes:
    return _text(module) + _text(name) + b"\x93\x94"


def _integer(value: int) -> bytes:
    return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)


def _array(
    kind: bytes, order: bytes, shape: tuple[int, ...], data: bytes, length: int | None = None, extra: bytes = b""
) -> bytes:
    made = (
        _name(b"numpy.core.multiarray", b"_reconstruct")
        + _name(b"numpy", b"ndarray")
        + b"K\0\x85\x94C\x01b\x94\x87\x94R\x94"
    )
    dtype = _name(b"numpy", b"dtype") + kind + b"\x89\x88\x87\x94R\x94(K\x03" + _text(order) + b"NNN"
    dtype += _integer(-1) * 2 + _integer(0) + b"t\x94b"
    sizes = b"(" + b"".join(map(_integer, shape)) + b"t\x94"
    announced = len(data) if length is None else length
    payload = b"B" + struct.pack("<I", announced) if announced < 1 << 32 else b"\x8e" + struct.pack("<Q", announced)
    return made + b"(K\x01" + sizes + dtype + b"\x89" + extra + payload + data + b"\x94t\x94b"
