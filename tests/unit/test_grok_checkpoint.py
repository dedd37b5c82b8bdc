"""Reading Grok-1's pickles: the right numbers, and nothing but numbers."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.grok_checkpoint import CheckpointError, convert_ckpt0, read_tensor
from tests import golden

CKPT = golden.GOLDENS / "grok1-m2/int8/ckpt-0"


def test_convert(tmp_path: Path) -> None:
    convert_ckpt0(CKPT, tmp_path, config=golden.config("grok1-m2"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"], config["head_dim"]) == (3, 344, 32)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(index) == 2 + 3 * (4 + 4 + 1 + 8 * 3)
    tensors = load_file(tmp_path / index["model.layers.2.block_sparse_moe.experts.7.w2.weight"])
    assert tensors["model.layers.2.block_sparse_moe.experts.7.w2.weight"].shape == (128, 344)
    gate = "model.layers.2.block_sparse_moe.gate.weight"
    assert load_file(tmp_path / index[gate])[gate].dtype == torch.float32
    # Both row blocks of a row-parallel matrix have their own scales.
    down = read_tensor(CKPT / "tensor00003_000", exact=True)
    for half, rows in enumerate((slice(0, 172), slice(172, 344))):
        steps = (down[0, rows, 0] / down[0, rows, 0].abs().max() * 127).round()
        assert torch.equal(steps, steps.trunc()), half


def test_dequantised_product_is_rounded(tmp_path: Path) -> None:
    exact = read_tensor(CKPT / "tensor00005_000", exact=True)
    rounded = read_tensor(CKPT / "tensor00005_000")
    assert torch.equal(rounded, exact.bfloat16().float())
    assert not torch.equal(rounded, exact)


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


@pytest.mark.parametrize(
    "value",
    [_Evil(), np.array([_Evil()], dtype=object), np.zeros(3, np.int64), "text", {"weight": 1}, np.float64(1)],
    ids=["code", "objects", "wrong dtype", "text", "dict", "scalar"],
)
def test_other_pickles_are_refused(tmp_path: Path, value: object) -> None:
    path = tmp_path / "tensor00000_000"
    path.write_bytes(pickle.dumps(value, protocol=4).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    with pytest.raises((CheckpointError, pickle.UnpicklingError)):
        read_tensor(path)


def test_wrong_number_of_files(tmp_path: Path) -> None:
    (tmp_path / "tensor00000_000").write_bytes(b"")
    with pytest.raises(CheckpointError, match="1 tensor files"):
        convert_ckpt0(tmp_path, tmp_path / "out")
