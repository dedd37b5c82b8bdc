"""Whole clusters on one GPU: attention there, experts there or in host memory, tokens equal to the goldens."""

from pathlib import Path

import pytest
import torch

from tests.e2e.test_goldens_http import check_goldens
from tests.e2e.test_goldens_http import folders as folders
from tests.serving import Serving
from tests.streams import replicas

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("worker_gpus", [0.25, 0], ids=["gpu", "host"])
@pytest.mark.parametrize("name", ["mixtral-tiny", "grok2-tiny", "grok1-m2", "gptoss-tiny", "qwen3moe-tiny"])
def test_greedy_tokens_equal_the_goldens(
    serving: Serving, folders: dict[str, Path], name: str, worker_gpus: float, enforce_eager: bool
) -> None:
    serving.deploy(
        {
            "model": str(folders[name]),
            "served_model_name": name,
            "license": "accepted",
            "dtype": "float32",
            "workers": 2,
            "engine": {
                "num_gpus": 0.5,
                "kv_cache_gib": 0.5,
                "enforce_eager": enforce_eager,
                "vllm": {"gpu_memory_utilization": 0.3},
            },
            "worker": {"num_gpus": worker_gpus},
        }
    )
    devices = [worker["device"] for shard in (0, 1) for worker in replicas(serving, shard)]
    assert len(devices) == 2 and all(("cuda" in device) is (worker_gpus > 0) for device in devices)
    check_goldens(serving, name)
