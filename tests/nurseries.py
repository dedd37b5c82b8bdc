"""Nurseries for tests: small ones, which have nothing to import, and the one that has vLLM for all who need it."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from deployments.nursery import nursery_name, start_nursery
from model.nursery_client import NURSERY

ROOT = Path(__file__).resolve().parents[1]
_NURSERY = """
import os
from model import nursery
nursery._import_everything = lambda: print("imported", flush=True) or {is_cpu}
{setup}
os._exit(nursery.main())
"""


@contextmanager
def small_nursery(
    setup: str = "", *, name: str | None = None, watched: int | None = None, is_cpu: bool = False
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Its name and process, ready, there for process `watched`, else us; `setup` is Python that runs before it."""
    name = name or nursery_name()
    code = _NURSERY.format(setup=setup, is_cpu=is_cpu)
    command = [sys.executable, "-c", code, name, str(watched or os.getpid())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=ROOT) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"imported\n"
            yield name, process
        finally:
            process.kill()


@contextmanager
def nursery_of_tests(log: Path) -> Iterator[None]:
    """From now on engines of this process, and run_module(), import nothing: vLLM takes each of them ten seconds."""
    name = nursery_name()
    with log.open("wb") as output, start_nursery(name, output.fileno()) as process:
        os.environ[NURSERY] = name
        try:
            yield
        finally:
            del os.environ[NURSERY]
            process.kill()


def run_module(name: str, *arguments: object, environment: Mapping[str, str] | None = None) -> str:
    """What `python -m name` says on stdout, after it has ended; a fork of the nursery of tests where there is one."""
    done = subprocess.run(
        [sys.executable, "-m", "model.forked_python", name, *map(str, arguments)],
        cwd=ROOT,
        env=None if environment is None else dict(environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(done.stderr[-4000:], file=sys.stderr)
    return done.stdout
