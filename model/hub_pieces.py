"""Which files a conversion of a Hugging Face folder writes: experts as integers, everything else as it is.

model-dense-<n>: what the n-th file (or set of TP parts) has besides experts. model-experts-layer-<l>: the experts of
layer l in order, each matrix as shape, scales and integers (model/quantised.py).

Letters: O outputs, I inputs.
"""

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import CheckpointError
from model.ckpt0_source import sha256_of
from model.conversion import Written, check_checksums
from model.conversion_journal import FileState, PieceState
from model.expert_weights import expert_of, is_expert_tensor, layer_of
from model.quantised import METADATA_KEY, Storage, pack, quantise
from model.safetensors_writer import SafetensorsWriter, TensorEntry
from model.tensor_sets import TensorSet, opened_set
from model.tp_shards import assembled_shape, shard_sets

Headers = Mapping[Path, Mapping[str, Mapping[str, Any]]]
Files = tuple[Path, ...]


@dataclass(frozen=True)
class Matrix:
    """A tensor of the source, whole: where its parts lie, dtype as safetensors writes it, and shape."""

    name: str
    files: Files
    dtype: str
    shape: tuple[int, ...]


class Hashes:
    """SHA-256 of source files, each read once for all the pieces that are made from it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of = functools.cache(sha256_of)

    def state(self, path: Path) -> FileState:
        status = path.stat()
        with self._lock:
            return FileState(status.st_size, self._of(path), status.st_mtime_ns)


@dataclass(frozen=True)
class HubPiece:
    """One file to write; storage: of the matrices, all of them experts'; None copies them."""

    name: str
    matrices: tuple[Matrix, ...]
    storage: Storage | None
    hashes: Hashes

    def _entries(self, matrix: Matrix) -> tuple[TensorEntry, ...]:
        if self.storage is None:
            return (TensorEntry(matrix.name, matrix.dtype, matrix.shape),)
        rows, columns = matrix.shape
        assert self.storage.group is not None, "a source of plain weights has no groups of its own"
        return self.storage.entries(matrix.name, rows, columns, columns // self.storage.group)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for matrix in self.matrices for entry in self._entries(matrix))

    @property
    def tensor_names(self) -> list[str]:
        return [entry.name for matrix in self.matrices for entry in self._entries(matrix)]

    @property
    def sources(self) -> dict[str, Path]:
        return {path.name: path for matrix in self.matrices for path in matrix.files}

    def write(self, folder: Path, checksums: Mapping[str, str], written: Written) -> PieceState:
        """See model/conversion.py."""
        sources = {name: self.hashes.state(path) for name, path in self.sources.items()}
        check_checksums(self, sources, checksums)
        metadata = {"format": "pt"} | ({METADATA_KEY: self.storage.metadata} if self.storage is not None else {})
        entries = [entry for matrix in self.matrices for entry in self._entries(matrix)]
        with ExitStack() as stack:
            out = stack.enter_context(SafetensorsWriter(folder / self.name, entries, metadata))
            sets = {files: stack.enter_context(opened_set(files)) for files in {m.files: None for m in self.matrices}}
            for matrix in self.matrices:
                for entry, values in zip(self._entries(matrix), self._values(matrix, sets), strict=True):
                    out.write(values.contiguous())
                    written(entry.name, entry.num_bytes)
            return PieceState(FileState(out.num_bytes, out.commit()), sources)

    def _values(self, matrix: Matrix, sets: Mapping[Files, TensorSet]) -> Iterator[Tensor]:
        weight = sets[matrix.files].tensor(matrix.name)
        if self.storage is None:
            yield weight
            return
        if not weight.isfinite().all():
            raise CheckpointError(
                f"{matrix.files[0]}: {matrix.name} has values that are not finite. Download it again."
            )
        assert self.storage.group is not None, "a source of plain weights has no groups of its own"
        integers_OI, scales_OG = quantise(weight, self.storage.bits, self.storage.group)
        yield torch.tensor(weight.shape)
        yield scales_OG
        yield pack(integers_OI, self.storage.bits)


def find_matrices(headers: Headers) -> list[Matrix]:
    """Every tensor of the files, in their order. Raises CheckpointError when parts do not fit."""
    found = []
    for files in shard_sets(headers):
        for name, entry in sorted(headers[files[0]].items(), key=lambda item: item[1]["data_offsets"][0]):
            parts = [headers[path][name]["shape"] for path in files]
            found.append(Matrix(name, files, entry["dtype"], assembled_shape(name, parts, files)))
    return found


def plan_pieces(matrices: Sequence[Matrix], storage: Storage) -> list[HubPiece]:
    """The files to write."""
    hashes = Hashes()
    dense: dict[Files, list[Matrix]] = {}
    routed: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        if is_expert_tensor(matrix.name):
            routed.setdefault(layer_of(matrix.name), []).append(matrix)
        else:
            dense.setdefault(matrix.files, []).append(matrix)
    pieces = [
        HubPiece(f"model-dense-{number:05d}.safetensors", tuple(here), None, hashes)
        for number, here in enumerate(dense.values())
    ]
    for layer, here in sorted(routed.items()):
        ordered = tuple(sorted(here, key=lambda matrix: (expert_of(matrix.name), matrix.name)))
        pieces.append(HubPiece(f"model-experts-layer-{layer:05d}.safetensors", ordered, storage, hashes))
    return pieces
