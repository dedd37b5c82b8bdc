"""Combining and staging: exact arithmetic, and no thread pool on the hot path."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.combine import Accumulator
from cluster.staging import Staging, as_array
from cluster.wire import Agreement

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 8), (5, 33), (70, 1024)])
def test_sums_are_float32_and_rounded_once(dtype, num_tokens, hidden):
    g = torch.Generator().manual_seed(0)
    total = Accumulator(hidden, 64)
    for _ in range(2):  # a second sum starts from nothing
        expected_TD = torch.zeros(num_tokens, hidden)
        total.begin(num_tokens)
        for i in range(4):
            rows = np.flatnonzero(np.random.default_rng(i).random(num_tokens) < 0.6) if i else slice(0, num_tokens)
            partial_tD = (torch.randn(len(expected_TD[rows]), hidden, generator=g) * 100).to(dtype)
            expected_TD[rows] += partial_tD.float()
            total.add(partial_tD, rows)
        out_TD = torch.full((num_tokens, hidden), float("nan"), dtype=dtype)
        total.finish(out_TD)
        assert torch.equal(out_TD, expected_TD.to(dtype))


def test_nothing_added_is_zero_and_nan_and_inf_survive():
    total = Accumulator(4, 3)
    out_TD = torch.empty(3, 4, dtype=torch.bfloat16)
    total.begin(3)
    total.finish(out_TD)
    assert not out_TD.any()
    special = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]], dtype=torch.bfloat16)
    total.begin(3)
    total.add(special, np.array([1]))
    total.finish(out_TD)
    assert out_TD[1].isnan().tolist() == [True, False, False, False] and out_TD[1, 1] == float("inf")
    assert not out_TD[0].any() and not out_TD[2].any()


def test_arrays_are_views():
    for dtype in DTYPES:
        tensor = torch.arange(6, dtype=torch.float32).view(2, 3).to(dtype)
        array = as_array(tensor)
        array[1, 2] = array[0, 1]
        assert tensor[1, 2] == 1 and array.dtype.itemsize == dtype.itemsize
    assert as_array(torch.ones(2, 2, requires_grad=True)).sum() == 4


def test_staging_copies_in_and_grows():
    staging = Staging(Agreement(4, 2, torch.bfloat16, 3, 1), torch.device("cpu"))
    for num_tokens in (2, 3, 9):
        x_TD, weights_TK = torch.randn(num_tokens, 4).bfloat16(), torch.rand(num_tokens, 2)
        ids_TK = torch.randint(0, 8, (num_tokens, 2))
        staged = staging.input(x_TD, weights_TK, ids_TK)
        assert (
            torch.equal(staged[0], x_TD) and torch.equal(staged[1], weights_TK) and torch.equal(staged[2], ids_TK.int())
        )
        assert staging.output(num_tokens).shape == x_TD.shape
        staging.output_used()


NO_POOL = """
import os, threading, torch
torch.set_num_threads(8)
from cluster import gang
gang._team_wait = lambda: None  # waiting is what the pool is meant to do
from cluster.dispatcher import Dispatcher
from cluster.fakes import ThreadWorker, ToyShape
from cluster.placement import partition

num_threads = lambda: len(os.listdir("/proc/self/task"))
for num_shards, dtype in ((1, torch.float32), (2, torch.float32), (2, torch.bfloat16)):
    shape = ToyShape(hidden=1024, dtype=dtype, max_tokens=512)
    shards = partition(shape.num_layers, shape.num_experts, num_shards)
    workers = [ThreadWorker(shape, s, compute=lambda *_: None) for s in shards]
    d = Dispatcher(engine_id="e", secret=shape.secret, hidden_size=1024, top_k=2, dtype=shape.dtype, max_tokens=512)
    d.update(shape.table(1, shards, [w.replica(f"r{i}") for i, w in enumerate(workers)]))
    for thread in threading.enumerate():
        if "connect" in thread.name:
            thread.join()
    before = num_threads()
    for num_tokens in (1, 40, 512):
        x = torch.empty(num_tokens, 1024, dtype=shape.dtype)
        w, ids = torch.ones(num_tokens, 2), torch.tensor([[0, 7], [1, 2]] * 256, dtype=torch.int32)[:num_tokens]
        out = torch.empty_like(x)
        for _ in range(3):
            d.finish(d.start(0, x, w, ids), out)
    assert num_threads() <= before, (num_shards, before, num_threads())  # less: a thread that connected was ending
    d.close()
    for worker in workers:
        worker.close()
torch.zeros(64, 1024).add_(1)
assert num_threads() > before  # the check can fail: this did enter the pool
"""


def test_a_layer_call_enters_no_thread_pool():
    done = subprocess.run([sys.executable, "-c", NO_POOL], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
