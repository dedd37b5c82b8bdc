"""Leftovers in /dev/shm are found by who maps them, and removed by name."""

import subprocess
import sys
from pathlib import Path

from deployments.shared_memory import mapped_by_descendants, remove

CHILD = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


def test_a_killed_childs_file_is_found_and_removed():
    file = Path("/dev/shm/switchyard-test-leftover")
    file.write_bytes(bytes(4096))
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"mapped\n"
        names = mapped_by_descendants()
        child.kill()
    assert file.name in names
    assert file.exists()
    remove({file.name})
    remove({file.name, "switchyard-test-never-there"})
    assert not file.exists()
