"""A forked worker has as many kernel threads as cores, each on its own, though OpenMP was loaded before the fork."""

import json
import os
import subprocess
import sys

import pytest

_SCRIPT = """
import json, os, sys
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
import torch
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
from model.kernel_threads import start_kernel_threads
cores = json.loads(sys.argv[1])
start_kernel_threads(cores)
threads = sorted(int(each) for each in os.listdir("/proc/self/task"))
bound = [sorted(os.sched_getaffinity(thread)) for thread in threads]
torch.zeros(1 << 22).add_(1)
later = sorted(int(each) for each in os.listdir("/proc/self/task"))
print(json.dumps([torch.get_num_threads(), bound, later == threads]), flush=True)
"""


@pytest.mark.parametrize("count", [1, 2])
def test_every_thread_has_a_core(count: int):
    cores = sorted(os.sched_getaffinity(0))[:count]
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(cores)], capture_output=True, text=True, check=True, timeout=60
    )
    num_threads, bound, is_complete = json.loads(run.stdout)
    assert num_threads == len(cores) and is_complete
    # set_num_threads() also makes the threads of a pool that no kernel here uses; they sleep wherever they like.
    assert [each for each in bound if len(each) == 1] == [[core] for core in cores] or len(cores) == 1
    assert bound[0] == [cores[0]]
