"""Released files, read as an engine and its workers read them, give the logits of the golden files.

The forward pass is the plain PyTorch one of tests/reference_grok.py; vLLM's is compared in tests/e2e.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.expert_weights import dense_weights, hosted_weights
from model.grok_checkpoint import convert_ckpt0
from model.moe_spec import weight_files
from tests import golden
from tests.reference_grok import ReferenceGrok

TOLERANCE = 2e-3
CKPT = golden.GOLDENS / "grok1-m2/int8/ckpt-0"


def read_in_shards(folder: Path, num_workers: int) -> dict[str, torch.Tensor]:
    """The dense tensors, and the experts as so many workers get them, numbered from 0, put together again."""
    files = weight_files(folder)
    weights = dict(dense_weights(files))
    per_worker = 8 // num_workers
    for worker in range(num_workers):
        first = worker * per_worker
        for name, tensor in hosted_weights(files, range(first, first + per_worker), 8):
            start, rest = name.split(".experts.")
            local, which = rest.split(".", 1)
            weights[f"{start}.experts.{first + int(local)}.{which}"] = tensor
    return weights


def largest_difference(folder: Path, weights: dict[str, torch.Tensor], cases: list[golden.Case]) -> float:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    reference = ReferenceGrok(config, {name: tensor.float() for name, tensor in weights.items()})
    return max(float(np.abs(reference.forward(case.prompt).numpy() - case.logits_TV).max()) for case in cases)


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "golden.npz"),
        ({"experts": "int8"}, "golden.npz"),
        ({"exact": True}, "golden_f32_exactdeq.npz"),
        ({"exact": True, "experts": "int8"}, "golden_f32_exactdeq.npz"),
    ],
    ids=["bf16", "int8", "exact", "int8-exact"],
)
def test_grok1(tmp_path: Path, options: dict, name: str, num_workers: int) -> None:
    convert_ckpt0(CKPT, tmp_path, config=golden.config("grok1-m2"), **options)
    cases = golden.load("grok1-m2", name)[: None if num_workers == 2 else 2]
    assert largest_difference(tmp_path, read_in_shards(tmp_path, num_workers), cases) < TOLERANCE


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
def test_grok2_as_it_lies(num_workers: int) -> None:
    folder = golden.GOLDENS / "grok2-tiny/tp8"
    cases = golden.load("grok2-tiny")[: None if num_workers == 2 else 2]
    assert largest_difference(folder, read_in_shards(folder, num_workers), cases) < TOLERANCE
