"""Core plans: shards divide the cores, engines use them all, explicit settings win."""

import pytest

from cluster.config import parse_settings
from deployments.cores import engine_cores, omp_binding, worker_cores


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [
        ((0, 1), 1, [(0, 1)]),
        ((0, 1), 2, [(0,), (1,)]),
        ((0, 1), 4, [(0,), (1,), (0,), (1,)]),
        ((0, 1, 2, 3), 2, [(0, 1), (2, 3)]),
        ((4, 5, 6), 2, [(4,), (5,)]),
        ((7,), 3, [(7,)] * 3),
    ],
)
def test_workers_divide_the_cores(cores, workers, expected):
    settings = parse_settings({"model": "m", "workers": workers})
    assert [worker_cores(settings, shard, cores) for shard in range(workers)] == expected


def test_explicit_threads_win():
    settings = parse_settings({"model": "m", "workers": 2, "worker": {"threads": 2}, "engine": {"threads": 1}})
    assert worker_cores(settings, 1, (0, 1)) == (0, 1)
    assert worker_cores(settings, 0, (0,)) == (0,)
    assert engine_cores(settings, (0, 1)) == (0,)
    assert engine_cores(parse_settings({"model": "m"}), (0, 1)) == (0, 1)


def test_omp_binding_gives_each_rank_its_own():
    assert omp_binding((0, 1), 1) == "0,1"
    assert omp_binding((0, 1, 2, 3), 2) == "0,1|2,3"
