"""Files in /dev/shm that processes map, so that they can be removed when those processes were killed.

vLLM's processes share buffers of 160 MB through such files. They remove them when they end in peace, not when they are
killed or take too long to end.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import psutil

_FOLDER = Path("/dev/shm")


def mapped_by_descendants() -> frozenset[str]:
    """Names in /dev/shm that descendants of this process have mapped now."""
    return mapped_by(psutil.Process().children(recursive=True))


def mapped_by(processes: Iterable[psutil.Process]) -> frozenset[str]:
    """Names in /dev/shm that these processes have mapped now."""
    names = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                path = line.split(maxsplit=5)[5:]
                if path and path[0].startswith(f"{_FOLDER}/"):
                    names.add(path[0].removeprefix(f"{_FOLDER}/").removesuffix(" (deleted)"))
    return frozenset(names)


def remove(names: Iterable[str]) -> None:
    """Remove these files of /dev/shm where they still exist; call it when their processes are gone."""
    for name in names:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            (_FOLDER / name).unlink()
