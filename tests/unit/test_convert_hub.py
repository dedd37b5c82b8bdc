"""Converting Hugging Face folders: Grok-2 in eight parts and Mixtral, their experts as integers, the rest untouched."""

import json
from pathlib import Path

import pytest
import torch

from cluster.errors import CheckpointError
from model.conversion_journal import RECORD
from model.expert_weights import dense_weights, hosted_integers, hosted_weights, is_expert_tensor, whole_weights
from model.hub_checkpoint import convert_hub
from model.moe_spec import inspect_checkpoint, weight_files
from model.quantised import plain, vllm_config
from ops.cli import main
from tests import golden

TP8 = golden.GOLDENS / "grok2-tiny/tp8"
MIXTRAL = golden.GOLDENS / "mixtral-tiny"


@pytest.mark.parametrize(("experts", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize(("source", "group"), [(TP8, 128), (MIXTRAL, 64)])
def test_experts_are_near_and_the_rest_is_the_same(tmp_path: Path, source, group: int, experts, bits: int) -> None:
    convert_hub(source, tmp_path, experts)
    original = dict(whole_weights(weight_files(source)))
    found = dict(whole_weights(weight_files(tmp_path)))
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        if not is_expert_tensor(name):
            assert torch.equal(found[name], tensor)
            continue
        step = tensor.float().unflatten(1, (-1, group)).abs().amax(-1) / (2 ** (bits - 1) - 0.5)
        error = (found[name] - tensor.float()).unflatten(1, (-1, group)).abs().amax(-1)
        assert (error <= (0.51 + 2.0 ** (bits - 9)) * step + 1e-8).all()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == vllm_config(experts, group)
    spec, before = inspect_checkpoint(str(tmp_path)), inspect_checkpoint(str(source))
    assert spec is not None and before is not None and spec.stored is not None
    assert (spec.stored.bits, spec.layers, spec.num_experts) == (bits, before.layers, before.num_experts)
    assert {path.name for path in source.glob("tokenizer*")} <= {path.name for path in tmp_path.iterdir()}


def test_a_worker_reads_its_experts_as_they_are_stored(tmp_path: Path) -> None:
    convert_hub(MIXTRAL, tmp_path, "int4")
    files = weight_files(tmp_path)
    expected = dict(hosted_weights(files, (5, 2), 8))
    found = list(hosted_integers(files, (1,), (5, 2)))
    assert [(layer, expert, name) for layer, expert, name, _ in found] == [
        (1, expert, name) for expert in (1, 0) for name in ("w1", "w2", "w3")
    ]
    for _, expert, name, matrix in found:
        (plain_name,) = [key for key in expected if f".1.block_sparse_moe.experts.{expert}.{name}" in key]
        assert torch.equal(plain(matrix), expected[plain_name])
    stored = dict(hosted_weights(files, (5,), 8, as_stored=True))
    assert {name.rsplit("_", 1)[1] for name in stored} == {"packed", "scale", "shape"}
    assert not any(is_expert_tensor(name) for name, _ in dense_weights(files))


def test_the_command_goes_on_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(TP8), str(tmp_path / "out"), "--experts", "int4", "--workers", "2"]
    assert main(command) == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert RECORD in first
    (tmp_path / "out/model-experts-layer-00001.safetensors").write_bytes(b"damaged")
    assert main(command) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    assert "time left unknown" not in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_converted_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([str(TP8)], "is served as it lies; to convert its experts give --experts int8 or int4"),
        ([str(TP8), "--experts", "int4", "--exact"], "--exact and --config are for Grok-1's ckpt-0"),
        ([str(golden.GOLDENS / "gptoss-tiny"), "--experts", "int4"], "serve this checkpoint as it is"),
    ):
        assert main(["convert", arguments[0], str(tmp_path / "out"), *arguments[1:]]) == 2
        assert words in capsys.readouterr().err
    convert_hub(MIXTRAL, tmp_path / "int8", "int8")
    with pytest.raises(CheckpointError, match="quantised already"):
        convert_hub(tmp_path / "int8", tmp_path / "again", "int4")
