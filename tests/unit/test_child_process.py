"""Real child processes: whose parent is killed, and that end in every way there is."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("spawn", "fork")

WAITS = """
import json, multiprocessing, os, signal

def child(pipe):
    from model.child_process import end_well
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_well()
    end_well()
    pipe.send(os.getpid())
    signal.pause()

if __name__ == "__main__":
    from model.child_process import end_well
    end_well()  # has no such parent, and goes on
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context({method!r}).Process(target=child, args=(theirs,)).start()
    print(json.dumps(ours.recv()), flush=True)
    signal.pause()
"""

ENDS = """
import atexit, multiprocessing, sys

class Torn:
    def __del__(self):
        print("torn down", flush=True)

def child():
    from model.child_process import end_well
    end_well()
    sys.torn = Torn()
    atexit.register(print, "exit function")
    print("last words")
    {end}

if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=child)
    process.start()
    process.join()
    print(process.exitcode)
"""


def start(tmp_path: Path, script: str) -> subprocess.Popen:
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )


@pytest.mark.parametrize("method", METHODS)
def test_it_does_not_outlive_its_parent(tmp_path, method):
    with start(tmp_path, WAITS.format(method=method)) as parent:
        child = os.pidfd_open(json.loads(parent.stdout.readline()))
        try:
            parent.kill()
            assert parent.wait(10) == -signal.SIGKILL
            assert select.select([child], [], [], 10)[0]
        finally:
            os.close(child)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("end", "status"), [("return", 0), ("sys.exit()", 0), ("sys.exit(3)", 3)])
def test_it_ends_at_once_with_its_status(tmp_path, method, end, status):
    with start(tmp_path, ENDS.format(method=method, end=end)) as parent:
        said, complaints = parent.communicate(timeout=30)
    # A fork has no exit functions, and ends at once as it is.
    assert said.split() == ["last", "words", *(["exit", "function"] if method == "spawn" else []), str(status)]
    assert not complaints


def test_an_error_is_told_as_ever(tmp_path):
    with start(tmp_path, ENDS.format(method="spawn", end="1 / 0")) as parent:
        said, complaints = parent.communicate(timeout=30)
    assert "exit function" in said and said.endswith("1\n") and "ZeroDivisionError" in complaints
