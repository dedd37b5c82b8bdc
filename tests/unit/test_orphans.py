"""Processes whose parent is killed, for real."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PARENT = """
import json, multiprocessing, os, signal

def child(pipe):
    from model.orphans import end_with_parent
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    end_with_parent()
    pipe.send(os.getpid())
    signal.pause()

if __name__ == "__main__":
    from model.orphans import end_with_parent
    end_with_parent()  # has no such parent, and goes on
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context({method!r}).Process(target=child, args=(theirs,)).start()
    print(json.dumps(ours.recv()), flush=True)
    signal.pause()
"""


def test_a_child_does_not_outlive_its_parent(tmp_path):
    for method in ("spawn", "fork"):
        script = tmp_path / f"{method}.py"
        script.write_text(PARENT.format(method=method))
        parent = subprocess.Popen(
            [sys.executable, script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        child = os.pidfd_open(json.loads(parent.stdout.readline()))
        try:
            parent.kill()
            assert parent.wait(10) == -signal.SIGKILL
            assert select.select([child], [], [], 10)[0], method
        finally:
            os.close(child)
            parent.stdout.close()
