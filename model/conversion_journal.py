"""What a conversion has finished, so that it can go on after it was killed, and a record of it all at the end.

While it runs, the target folder has JOURNAL; when it is complete, RECORD, with the same content but for the times.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ConfigError
from model.ckpt0_source import sha256_of
from model.safetensors_writer import PARTIAL_SUFFIX, write_json

JOURNAL = ".conversion.json"
RECORD = "switchyard_conversion.json"
_FORMAT = 2


@dataclass(frozen=True)
class FileState:
    """A file's size in bytes, its SHA-256 and, for a source in the journal, its modification time in ns."""

    num_bytes: int
    sha256: str
    mtime_ns: int | None = None


@dataclass(frozen=True)
class PieceState:
    """A finished file of the target, and the sources it was made from, by name."""

    output: FileState
    sources: Mapping[str, FileState]


class Journal:
    """The finished pieces of one conversion into `folder`; `options` is what decides their content (plain JSON)."""

    def __init__(self, folder: Path, options: Mapping[str, Any]):
        self._folder = folder
        self._options = json.loads(json.dumps(options))
        self.pieces: dict[str, PieceState] = {}
        stored = _read(folder)
        if stored is not None:
            if stored["options"] != self._options:
                raise ConfigError(f"{folder} holds a conversion with other options. Give another folder, or remove it.")
            self.pieces = {name: _piece(piece) for name, piece in stored["pieces"].items()}
        elif any(not path.name.endswith(PARTIAL_SUFFIX) for path in folder.iterdir()):
            raise ConfigError(f"{folder} exists already and is not empty. Give another folder, or remove it.")
        else:
            self._write(JOURNAL, with_times=True)

    def is_finished(self, name: str, sources: Mapping[str, Path]) -> bool:
        """True when the piece is in the folder as it was written.

        Raises CheckpointError, naming the file, when a source of a finished piece is not what it was.
        """
        piece = self.pieces.get(name)
        if piece is None or piece.sources.keys() != sources.keys():
            return False
        for source, path in sources.items():
            _check_unchanged(path, piece.sources[source])
        output = self._folder / name
        is_there = output.is_file() and output.stat().st_size == piece.output.num_bytes
        return is_there and sha256_of(output) == piece.output.sha256

    def add(self, name: str, piece: PieceState) -> None:
        """Note a piece that lies complete in the folder."""
        self.pieces[name] = piece
        self._write(JOURNAL, with_times=True)

    def close(self) -> None:
        """Write the record and remove the journal: the conversion is complete."""
        self._write(RECORD, with_times=False)
        (self._folder / JOURNAL).unlink(missing_ok=True)

    def _write(self, name: str, with_times: bool) -> None:
        pieces = {
            piece: {
                "output": _plain(state.output, False),
                "sources": {source: _plain(file, with_times) for source, file in sorted(state.sources.items())},
            }
            for piece, state in sorted(self.pieces.items())
        }
        write_json(self._folder / name, {"format": _FORMAT, "options": self._options, "pieces": pieces})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process may write to `folder` at a time; the lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"Another conversion is writing to {folder}. Wait for it, or give another folder.") from None


def _check_unchanged(path: Path, before: FileState) -> None:
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) == (before.num_bytes, before.mtime_ns):
        return
    if status.st_size != before.num_bytes or sha256_of(path) != before.sha256:
        raise CheckpointError(
            f"{path} is not the file that was converted before (its SHA-256 was {before.sha256}). "
            "Put that one back, or convert into another folder."
        )


def _read(folder: Path) -> dict[str, Any] | None:
    path = next((folder / name for name in (JOURNAL, RECORD) if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}. Remove the folder and convert again.") from None
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
        raise ConfigError(f"{path} is of another version. Remove the folder and convert again.")
    return stored


def _piece(stored: Mapping[str, Any]) -> PieceState:
    sources = {name: FileState(**state) for name, state in stored["sources"].items()}
    return PieceState(FileState(**stored["output"]), sources)


def _plain(state: FileState, with_times: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {"num_bytes": state.num_bytes, "sha256": state.sha256}
    return plain | {"mtime_ns": state.mtime_ns} if with_times and state.mtime_ns is not None else plain
