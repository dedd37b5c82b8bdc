"""Nurseries that have nothing to import: real processes and real forks in a moment."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deployments.nursery import nursery_name

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
