"""A worker's experts on a GPU by vLLM's kernels, and in host memory beside it, against float64 sums."""

from pathlib import Path

import pytest
import torch

from ops.bench.make_model import ModelShape, make_model
from ops.cli import main
from tests import expert_answers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(400),
]

# Sizes that vLLM's kernels for 4-bit weights on GPUs take: multiples of 128.
SHAPE = ModelShape(hidden=512, expert=1024, layers=2, vocab=512)
NUM_TOKENS = 33


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random Mixtral with its experts stored in three ways."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "bf16", SHAPE)
    for precision in ("int8", "int4"):
        assert main(["convert", str(folder / "bf16"), str(folder / precision), "--experts", precision]) == 0
    return {name: folder / name for name in ("bf16", "int8", "int4")}


@pytest.mark.parametrize("in_host_memory", [False, True], ids=["gpu", "host"])
@pytest.mark.parametrize("stored", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("float32", 1e-5)])
def test_answers_are_the_checkpoints(folders, tmp_path, stored, in_host_memory, dtype, tolerance) -> None:
    experts = range(2, 7)  # the others are elsewhere
    order = {"dtype": dtype, "experts": (2, 7), "tokens": NUM_TOKENS, "in_host_memory": in_host_memory}
    found = expert_answers.answers(folders[stored], tmp_path, **order)
    assert ("cuda" in found["device"]) is not in_host_memory
    truth = expert_answers.expected(folders[stored], dtype, NUM_TOKENS, experts)
    for layer, expected_TD in truth.items():
        error = (found["answers"][layer].double() - expected_TD).abs().max() / expected_TD.abs().max()
        assert error < tolerance
    if stored != "bf16" and (in_host_memory or dtype == "bfloat16"):  # else they are multiplied out
        bytes_of_bf16 = len(experts) * SHAPE.layers * 3 * SHAPE.hidden * SHAPE.expert * 2
        assert found["memory_bytes"] < bytes_of_bf16 * (0.6 if stored == "int8" else 0.35)
