"""Which clusters run on this machine: a file each, private to the user, written by `switchyard serve`.

<folder>/<pid>.json, mode 0600, in $XDG_RUNTIME_DIR/switchyard or ~/.cache/switchyard/run, mode 0700.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from cluster.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One running `switchyard serve`: where its HTTP API and its ops API listen, and what opens the latter."""

    pid: int
    started_s: float
    model: str
    http: str
    ops: str
    token: str
    logs: str


def this_process(**fields: str) -> Run:
    """The Run of the calling process."""
    return Run(pid=os.getpid(), started_s=psutil.Process().create_time(), **fields)


@contextlib.contextmanager
def announced(run: Run) -> Iterator[Path]:
    """The run file exists meanwhile."""
    folder = run_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{run.pid}.json"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(dataclasses.asdict(run), file)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Joined:
    """One running `switchyard join`."""

    pid: int
    started_s: float
    head: str


@contextlib.contextmanager
def joined_here(head: str) -> Iterator[None]:
    """`switchyard down` finds this process meanwhile."""
    folder = run_folder() / "joined"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{os.getpid()}.json"
    me = Joined(os.getpid(), psutil.Process().create_time(), head)
    path.write_text(json.dumps(dataclasses.asdict(me)), encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def joined_nodes() -> list[Joined]:
    """Every `switchyard join` of this user that runs here."""
    found = []
    for path in sorted((run_folder() / "joined").glob("*.json")):
        node = _read(path, Joined)
        if node is not None and _is_alive(node.pid, node.started_s):
            found.append(node)
        else:
            path.unlink(missing_ok=True)
    return found


def run_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "switchyard") if runtime else Path.home() / ".cache" / "switchyard" / "run"


def living_runs() -> list[Run]:
    """Every cluster that runs; the files of those that do not are removed."""
    found = []
    for path in sorted(run_folder().glob("*.json")):
        run = _read(path, Run)
        if run is not None and _is_alive(run.pid, run.started_s):
            found.append(run)
        else:
            path.unlink(missing_ok=True)
    return found


def find_run(port: int | None) -> Run:
    """The only one, or the one whose HTTP API has that port. Raises ConfigError that says what there is."""
    runs = living_runs()
    chosen = [run for run in runs if port is None or run.http.rsplit(":", 1)[-1] == str(port)]
    if len(chosen) == 1:
        return chosen[0]
    if not runs:
        raise ConfigError("no cluster of yours runs on this machine. Start one with `switchyard serve`.")
    names = ", ".join(f"{run.http} ({run.model})" for run in runs)
    if not chosen:
        raise ConfigError(f"no cluster listens on port {port}. There is {names}.")
    raise ConfigError(f"several clusters run on this machine: {names}. Choose one with --port.")


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_alive(pid: int, started_s: float) -> bool:
    """The process exists and is not another with the same number."""
    try:
        return bool(abs(psutil.Process(pid).create_time() - started_s) < 1.0)
    except psutil.NoSuchProcess:
        return False
