"""Grok-1 as released (the ckpt-0 folder of xai-org/grok-1) -> safetensors with the names of xai-org/grok-2.

ckpt0_pickle reads a file's structure, ckpt0_layout knows the whole folder, ckpt0_pieces what is written; here it is
done, file by file, and goes on where it was interrupted.
"""

import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cluster.errors import CheckpointError, ConfigError
from model.ckpt0_checksums import known_checksums
from model.ckpt0_layout import RELEASED, Ckpt0, inspect_ckpt0, tensor_paths
from model.ckpt0_pickle import inspect_file
from model.ckpt0_pieces import Piece, check_checksums, check_distinct, plan_pieces, write_piece
from model.ckpt0_source import TensorReader
from model.conversion_journal import Journal, locked
from model.int8_experts import METADATA_KEY, dequantise
from model.licence import licence_files
from model.safetensors_writer import partial_path, write_json

__all__ = ["RELEASED", "CheckpointError", "Progress", "convert_ckpt0", "read_tensor"]

Experts = Literal["bf16", "int8"]
_DISK_RESERVE_BYTES = 64 << 20


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: bytes to be written in all, of which so many are done, or were found done before."""

    total_bytes: int
    done_bytes: int
    found_bytes: int
    num_files: int
    num_files_done: int
    last: str


def read_tensor(path: Path, exact: bool = False) -> Tensor:
    """One file of ckpt-0 as float32 values of its own shape.

    A quantised tensor is int8 * scale, the product rounded to bfloat16 as xAI's code does; exact=True keeps the float32
    product. Raises CheckpointError.
    """
    with TensorReader(inspect_file(path)) as reader:
        values = reader.whole()
        if reader.tensor.scales is None:
            return values
        scales = reader.scales()
    rows, groups = values.shape[-2], scales.shape[-2]
    # The scales of a row, repeated, make every row a matrix of one group.
    flat = values.transpose(-1, -2).reshape(-1, rows)
    scales = scales.transpose(-1, -2).reshape(-1, groups)
    product = dequantise(flat, scales, torch.float32 if exact else torch.bfloat16).float()
    return product.view(values.transpose(-1, -2).shape).transpose(-1, -2).contiguous()


def convert_ckpt0(
    src: str | Path,
    dst: str | Path,
    exact: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    experts: Experts = "bf16",
    workers: int = 1,
    progress: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Write ckpt-0 folder `src` (or the folder it is in) as the Hugging Face model folder `dst`.

    A conversion that was interrupted is taken up where it was; one that is complete is verified. tokenizer.model and a
    licence file are copied when they are in `src`.
    exact: see read_tensor; such weights are stored as float32, the others as bfloat16 (norms, gate and embeddings are
    float32 in both, as in ckpt-0). config: fields of xAI's run.py that the files do not tell (key_size, the
    multipliers, sequence_len, num_selected_experts); those of the released model where it lacks them.
    experts: "int8" keeps the released weights and scales (model/int8_experts.py). workers: files written at the same
    time, each with about a gigabyte of memory at Grok-1's size. progress is called from several threads, one at a time.
    Raises CheckpointError naming a file that is missing, damaged or misplaced, ConfigError for a `dst` in use.
    """
    given, target = Path(src), Path(dst)
    source = _ckpt0_folder(given)
    checkpoint = inspect_ckpt0(source, config)
    pieces = plan_pieces(checkpoint, experts, exact)
    checksums = known_checksums(tensor_paths(source))
    try:
        target.mkdir(parents=True, exist_ok=True)
        with locked(target):
            journal = Journal(target, {"experts": experts, "exact": exact, "config": dict(checkpoint.config)})
            _Conversion(target, pieces, journal, checksums, progress).run(workers)
            _copy_companions((given, source), target)
            _finish(target, checkpoint, pieces, journal, experts, exact)
    except OSError as error:
        raise ConfigError(f"{error.filename or target}: {error.strerror}") from None


class _Conversion:
    """The pieces on their way into the folder."""

    def __init__(
        self,
        target: Path,
        pieces: list[Piece],
        journal: Journal,
        checksums: dict[str, str],
        progress: Callable[[Progress], None],
    ):
        self._target = target
        self._pieces = pieces
        self._journal = journal
        self._checksums = checksums
        self._progress = progress
        self._lock = threading.Lock()
        self._journal_lock = threading.Lock()
        self._is_stopped = False
        self._total_bytes = sum(piece.num_bytes for piece in pieces)
        self._done_bytes = self._found_bytes = self._num_files_done = 0

    def run(self, workers: int) -> None:
        """Write what is not there yet. The first error stops the other threads after their current tensor."""
        todo = [piece for piece in self._pieces if not self._find(piece)]
        for piece in todo:
            partial_path(self._target / piece.name).unlink(missing_ok=True)
        self._check_disk(todo)
        with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
            started = [pool.submit(self._write, piece) for piece in todo]
            try:
                for future in as_completed(started):
                    future.result()
            finally:
                self._is_stopped = True
                pool.shutdown(cancel_futures=True)

    def _find(self, piece: Piece) -> bool:
        if not self._journal.is_finished(piece.name, piece.sources):
            return False
        check_checksums(piece, self._journal.pieces[piece.name].sources, self._checksums)
        self._found_bytes += piece.num_bytes
        self._report(piece.name, piece.num_bytes, files=1)
        return True

    def _write(self, piece: Piece) -> None:
        state = write_piece(piece, self._target, self._checksums, self._written)
        with self._journal_lock:
            check_distinct([*self._journal.pieces.values(), state])
            self._journal.add(piece.name, state)
        self._report(piece.name, files=1)

    def _written(self, name: str, num_bytes: int) -> None:
        if self._is_stopped:
            raise InterruptedError("another file could not be converted")
        self._report(name, num_bytes)

    def _report(self, last: str, num_bytes: int = 0, files: int = 0) -> None:
        with self._lock:
            self._done_bytes += num_bytes
            self._num_files_done += files
            done = (self._done_bytes, self._found_bytes, len(self._pieces), self._num_files_done)
            self._progress(Progress(self._total_bytes, *done, last))

    def _check_disk(self, todo: list[Piece]) -> None:
        needed_bytes = sum(piece.num_bytes for piece in todo) + _DISK_RESERVE_BYTES
        free_bytes = shutil.disk_usage(self._target).free
        if todo and free_bytes < needed_bytes:
            raise ConfigError(
                f"{self._target} has {free_bytes / 1e9:.2f} GB left, the conversion needs {needed_bytes / 1e9:.2f} GB. "
                "Make room, or convert elsewhere."
            )


def _ckpt0_folder(source: Path) -> Path:
    inner = source / "ckpt-0"
    return inner if inner.is_dir() and not any(source.glob("tensor*")) else source


def _copy_companions(folders: Iterable[Path], target: Path) -> None:
    """The tokenizer and the licence, where they lie in the folders that were given."""
    for folder in dict.fromkeys(folders):
        for path in (folder / "tokenizer.model", *licence_files(folder)):
            if path.is_file() and not (target / path.name).exists():
                partial = partial_path(target / path.name)
                shutil.copyfile(path, partial)
                partial.rename(target / path.name)


def _finish(
    target: Path, checkpoint: Ckpt0, pieces: list[Piece], journal: Journal, experts: Experts, exact: bool
) -> None:
    """The files that make a model folder of it; config.json before the record, which says that all is there."""
    weight_map = {tensor.entry.name: piece.name for piece in pieces for tensor in piece.tensors}
    total_bytes = sum(piece.num_bytes for piece in pieces)
    config = dict(checkpoint.config)
    if experts == "int8":
        config[METADATA_KEY] = {"experts": "int8", "scales": "bfloat16", "product": "float32" if exact else "bfloat16"}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(target / "model.safetensors.index.json", index)
    write_json(target / "config.json", config)
    journal.close()
    for leftover in target.glob(".*.partial"):  # of JSON files
        leftover.unlink()
