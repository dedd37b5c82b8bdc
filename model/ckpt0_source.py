"""The numbers of one ckpt-0 file, read once and in order, so that its checksum comes with them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import CheckpointError
from model.ckpt0_pickle import ArrayPlace, TensorFile

_NUMPY: dict[str, np.dtype[Any]] = {"I8": np.dtype("i1"), "BF16": np.dtype("<i2"), "F32": np.dtype("<f4")}
_CHUNK_BYTES = 64 << 20


class TensorReader:
    """Reads a TensorFile: parts and chunks of its values in ascending order, then finish() for the checksum.

    Raises CheckpointError, naming the file, when it ends early or holds a scale or value that is no finite number.
    """

    def __init__(self, tensor: TensorFile):
        self.tensor = tensor
        self._file = tensor.path.open("rb", buffering=0)
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._whole: np.ndarray | None = None  # of an array in Fortran order, which cannot be read in parts

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._file.close()

    def scales(self) -> Tensor:
        """All scales, bfloat16 in their own shape [.., groups, out]."""
        place = self.tensor.scales
        assert place is not None, "asked of a float32 file"
        self._file.seek(place.offset)
        scales = torch.from_numpy(_array(place, self._read(place.num_bytes))).view(torch.bfloat16)
        if not scales.isfinite().all():
            raise CheckpointError(f"{self.tensor.path} has scales that are not finite. Download it again.")
        return scales

    def part(self, number: int) -> Tensor:
        """Block `number` of the first dimension, with the file's dtype."""
        place = self.tensor.values
        if place.is_fortran:
            return torch.from_numpy(np.ascontiguousarray(self._everything()[number]))
        part = ArrayPlace(place.dtype, place.shape[1:] or (1,), 0)
        data = self._in_order(place.offset + number * part.num_bytes, part.num_bytes)
        return self._finite(torch.from_numpy(_array(part, data)))

    def whole(self) -> Tensor:
        """All values at once."""
        return self._finite(torch.from_numpy(np.ascontiguousarray(self._everything())))

    def chunks(self) -> Iterator[Tensor]:
        """All values in C order, one-dimensional, in pieces of bounded size."""
        place = self.tensor.values
        if place.is_fortran:
            yield self.whole().flatten()
            return
        for first in range(0, place.num_bytes, _CHUNK_BYTES):
            data = self._in_order(place.offset + first, min(_CHUNK_BYTES, place.num_bytes - first))
            yield self._finite(torch.from_numpy(np.frombuffer(data, _NUMPY[place.dtype])))

    def finish(self) -> str:
        """SHA-256 of the whole file, hexadecimal; reads what has not been read."""
        self._skip_to(self.tensor.num_bytes)
        return self._hash.hexdigest()

    def _everything(self) -> np.ndarray:
        if self._whole is None:
            place = self.tensor.values
            self._whole = _array(place, self._in_order(place.offset, place.num_bytes))
        return self._whole

    def _finite(self, values: Tensor) -> Tensor:
        if values.is_floating_point() and not values.isfinite().all():
            raise CheckpointError(f"{self.tensor.path} has values that are not finite. Download it again.")
        return values

    def _in_order(self, offset: int, count: int) -> bytearray:
        self._skip_to(offset)
        return self._hashed_read(count)

    def _skip_to(self, offset: int) -> None:
        assert self._hashed <= offset, "parts are read in ascending order"
        while self._hashed < offset:
            self._hashed_read(min(_CHUNK_BYTES, offset - self._hashed))

    def _hashed_read(self, count: int) -> bytearray:
        self._file.seek(self._hashed)
        data = self._read(count)
        self._hash.update(data)
        self._hashed += count
        return data

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        done = 0
        while done < count:
            got = self._file.readinto(view[done:])
            if not got:
                raise CheckpointError(f"{self.tensor.path} ends early: it was changed while it was read")
            done += got
        return data


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _array(place: ArrayPlace, data: bytearray) -> np.ndarray:
    return np.frombuffer(data, _NUMPY[place.dtype]).reshape(place.shape, order="F" if place.is_fortran else "C")
