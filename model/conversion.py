"""Writing a converted checkpoint file by file; it goes on where it was interrupted.

What is written, and from what, is a plan of pieces: model/ckpt0_pieces.py for Grok-1's ckpt-0, model/hub_pieces.py for
a Hugging Face folder.
"""

import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import CheckpointError, ConfigError
from model.conversion_journal import FileState, Journal, PieceState, locked
from model.safetensors_writer import partial_path, write_json

_DISK_RESERVE_BYTES = 64 << 20
_DISTINCT_BYTES = 8192  # small sources may be equal: norms of all ones

Written = Callable[[str, int], None]


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: bytes to be written in all, of which so many are done, or were found done before."""

    total_bytes: int
    done_bytes: int
    found_bytes: int
    num_files: int
    num_files_done: int
    last: str


class Piece(Protocol):
    """One file to write."""

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def tensor_names(self) -> Sequence[str]: ...

    @property
    def sources(self) -> Mapping[str, Path]:
        """The files that it is made from, by name."""

    def write(self, folder: Path, checksums: Mapping[str, str], written: Written) -> PieceState:
        """Write it. checksums: the known SHA-256 of sources; written(tensor name, bytes) is called after each tensor.

        Raises CheckpointError, naming the source, for numbers that are not finite or a file of another checksum; what
        `written` raises passes through. In either case the file does not appear.
        """


@dataclass(frozen=True)
class Plan:
    """A conversion: `options` is what decides the content of its pieces, `companions` the files to copy beside them."""

    pieces: Sequence[Piece]
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    checksums: Mapping[str, str]
    companions: Iterable[Path]


def convert(plan: Plan, target: Path, workers: int, progress: Callable[[Progress], None]) -> None:
    """Write the plan into folder `target`, or go on with it; one that is complete is verified.

    workers: files written at the same time. progress is called from several threads, one at a time. Raises
    CheckpointError naming a source that is damaged, ConfigError for a target in use or too small.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        with locked(target):
            journal = Journal(target, plan.options)
            _Conversion(target, plan, journal, progress).run(workers)
            _copy(plan.companions, target)
            _finish(target, plan, journal)
    except OSError as error:
        raise ConfigError(f"{error.filename or target}: {error.strerror}") from None


class _Conversion:
    """The pieces on their way into the folder."""

    def __init__(self, target: Path, plan: Plan, journal: Journal, progress: Callable[[Progress], None]):
        self._target = target
        self._pieces = plan.pieces
        self._journal = journal
        self._checksums = plan.checksums
        self._progress = progress
        self._lock = threading.Lock()
        self._journal_lock = threading.Lock()
        self._is_stopped = False
        self._total_bytes = sum(piece.num_bytes for piece in self._pieces)
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
        state = piece.write(self._target, self._checksums, self._written)
        with self._journal_lock:
            _check_distinct([*self._journal.pieces.values(), state])
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


def check_checksums(piece: Piece, sources: Mapping[str, FileState], checksums: Mapping[str, str]) -> None:
    """Raises CheckpointError, naming the source, when a piece was made from a file of another checksum."""
    for name, state in sources.items():
        if checksums.get(name, state.sha256) != state.sha256:
            raise CheckpointError(
                f"{piece.sources[name]} has SHA-256 {state.sha256}, but the download was to have {checksums[name]}: "
                "it is damaged, or another file under this name. Download it again."
            )


def _check_distinct(states: Sequence[PieceState]) -> None:
    """No two large sources may be the same file: one of them would be a copy in another's place."""
    seen: dict[str, str] = {}
    for name, file in (item for state in states for item in sorted(state.sources.items())):
        if file.num_bytes >= _DISTINCT_BYTES and (other := seen.setdefault(file.sha256, name)) != name:
            raise CheckpointError(f"{other} and {name} are the same file, byte by byte. Download both again.")


def _copy(companions: Iterable[Path], target: Path) -> None:
    for path in companions:
        if path.is_file() and not (target / path.name).exists():
            partial = partial_path(target / path.name)
            shutil.copyfile(path, partial)
            partial.rename(target / path.name)


def _finish(target: Path, plan: Plan, journal: Journal) -> None:
    """The files that make a model folder of it; config.json before the record, which says that all is there."""
    weight_map = {name: piece.name for piece in plan.pieces for name in piece.tensor_names}
    total_bytes = sum(piece.num_bytes for piece in plan.pieces)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(target / "model.safetensors.index.json", index)
    write_json(target / "config.json", plan.config)
    journal.close()
    for leftover in target.glob(".*.partial"):  # of JSON files
        leftover.unlink()
