"""Writes one safetensors file tensor by tensor, in the order given, so that it is either whole or not there.

Format: github.com/huggingface/safetensors, README "Format": the header's length as 8 bytes little-endian, the header as
JSON padded with spaces to a multiple of 8, then the tensors without gaps. Its own writer sorts tensors and wants them
all in memory; here the order is the order in which a worker will read them.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

PARTIAL_SUFFIX = ".partial"
_ITEM_BYTES = {"I8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}


@dataclass(frozen=True)
class TensorEntry:
    """Name, dtype (one of _ITEM_BYTES) and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def header_bytes(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Everything before the tensors."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class SafetensorsWriter:
    """write() the entries' data in order, then commit(): only then does the file appear under its name."""

    def __init__(self, path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str]):
        self._path = path
        self._partial = partial_path(path)
        self._hash = hashlib.sha256()
        self._file = self._partial.open("wb", buffering=0)
        header = header_bytes(entries, metadata)
        self.num_bytes = len(header) + sum(entry.num_bytes for entry in entries)
        self._written = 0
        self._write_all(memoryview(header))

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def write(self, values: Tensor) -> None:
        """The next bytes: a contiguous tensor of any dtype."""
        bytes_U = values.reshape(-1).view(torch.uint8)  # by torch: numpy has no bfloat16
        self._write_all(bytes_U.numpy().data)

    def commit(self) -> str:
        """Flush to the disk and rename. Returns the file's SHA-256, hexadecimal."""
        assert self._written == self.num_bytes, f"{self._written} of {self.num_bytes} bytes written"
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self._path)
        sync_folder(self._path.parent)
        return self._hash.hexdigest()

    def _write_all(self, data: memoryview) -> None:
        self._hash.update(data)
        self._written += len(data)
        while data:
            data = data[self._file.write(data) :]


def partial_path(path: Path) -> Path:
    """Where a file lies until it is complete: hidden, and not *.safetensors."""
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


def write_json(path: Path, value: object) -> None:
    """Write `value` so that the file is either the old one or the new one, whatever happens."""
    partial = partial_path(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the disk know the folder's names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
