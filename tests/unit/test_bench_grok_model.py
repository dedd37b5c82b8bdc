"""Random Groks: the released layouts to the byte, read by our own converter and loader; refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model import random_checkpoint
from model.ckpt0_encoding import ArraySpec, float_parts, quantised_parts
from model.ckpt0_layout import inspect_ckpt0
from model.ckpt0_pickle import inspect_file
from model.ckpt0_source import TensorReader
from model.expert_weights import hosted_weights, whole_weights
from model.grok_checkpoint import convert_ckpt0
from model.grok_spec import parse_spec
from model.grok_tensors import expected_shapes
from model.hub_checkpoint import convert_hub
from model.moe_spec import inspect_checkpoint, weight_files
from model.random_grok import grok_checkpoint
from model.tensor_sets import each_once
from model.tokenizer_files import find_tokenizer
from ops.cli import main
from tests import golden

SIZES = {
    "hidden": 128,
    "expert": 256,
    "layers": 2,
    "experts": 4,
    "heads": 6,
    "kv-heads": 2,
    "head-dim": 8,
    "vocab": 300,
}
TINY = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


def make(folder: Path, *options: str) -> int:
    return main(["bench", "make-model", str(folder), *options])


@pytest.mark.parametrize(
    "path", sorted((golden.GOLDENS / "grok1-m2/int8/ckpt-0").iterdir()), ids=lambda path: path.name
)
def test_a_file_is_encoded_as_xais_code_wrote_it(path: Path) -> None:
    file, content = inspect_file(path), path.read_bytes()
    shape, scales = file.values.shape, file.scales
    parts = float_parts(shape) if scales is None else quantised_parts(shape, scales.shape)
    places = iter([file.values] if scales is None else [file.values, scales])
    encoded = b""
    for part in parts:
        if isinstance(part, ArraySpec):
            place = next(places)
            assert (part.dtype, part.shape) == (place.dtype, place.shape)
            part = content[place.offset : place.offset + place.num_bytes]
        encoded += part
    assert encoded == content


def test_grok_1_has_the_released_files_and_sizes() -> None:
    """Sizes of the files of xai-org/grok-1 as they are published."""
    checkpoint = grok_checkpoint("grok-1", "ckpt-0", {})
    sizes = [file.num_bytes for file in checkpoint.files]
    assert len(sizes) == 770
    experts, attention = [1611137347, 1611399491, 1611137347], [6293814, 37847359, 37761334, 6293814]
    assert sizes == [3221225637, 24727, *([*experts, *attention, *[24727] * 4, 196770] * 64)]
    assert checkpoint.files[769].name == "tensor00769_000"


def test_grok_2_has_the_released_files() -> None:
    checkpoint = grok_checkpoint("grok-2", "tp8", {"num_layers": 1})
    shapes = {
        file.name: file.shapes for file in checkpoint.files if isinstance(file, random_checkpoint.SafetensorsFile)
    }
    assert len(shapes) == 39
    prefix = "model.layers.0.block_sparse_moe.experts.7."
    for number, name, shape in ((6, "w1", (2048, 8192)), (7, "w2", (8192, 2048)), (8, "w3", (2048, 8192))):
        for rank in range(8):
            assert shapes[f"pytorch_model-{number:05d}-TP-{rank:03d}.safetensors"][f"{prefix}{name}.weight"] == shape
    assert shapes["pytorch_model-00004-TP-common.safetensors"] == {"model.layers.0.mlp.down_proj.weight": (8192, 32768)}
    assert checkpoint.config["embedding_multiplier_scale"] == 90.50966799187809


def test_ckpt0_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "ckpt-0", tmp_path / "out"
    assert make(source, "--shape", "grok-1", *TINY) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{source}\n"
    assert "26 of 26 files" in shown.err.splitlines()[-1] and "0 min 00 s left" in shown.err
    assert main(["convert", str(source), str(target), "--experts", "int8"]) == 0
    config = json.loads((target / "config.json").read_text())
    spec = parse_spec(config)
    assert (spec.hidden_size, spec.expert_size, spec.num_layers, spec.num_experts) == (128, 256, 2, 4)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (6, 2, 8, 300)
    assert spec.embedding_multiplier == 128**0.5 and spec.score_scale == 8**-0.5
    tensors = dict(each_once(whole_weights(weight_files(target))))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes(spec)
    for name, tensor in tensors.items():
        assert tensor.isfinite().all()
        if tensor.dim() == 2:
            assert float(tensor.float().std()) == pytest.approx(tensor.shape[1] ** -0.5, rel=0.15), name
        else:
            assert float(tensor.float().mean()) == pytest.approx(1, abs=0.05)


def test_ckpt0_keeps_eight_rows_of_scales(tmp_path: Path) -> None:
    make(tmp_path / "ckpt-0", "--shape", "grok-1", *TINY)
    config = json.loads((tmp_path / "ckpt-0/config.json").read_text())
    down = inspect_ckpt0(tmp_path / "ckpt-0", config).layers[0][1]
    assert down.scales is not None and down.scales.shape == (4, 8, 128)
    with TensorReader(down) as reader:
        assert reader.scales().unique().numel() > 100
        weights = reader.whole()
    assert (int(weights.min()), int(weights.max())) == (-127, 127)


def test_tp8_is_read_whole(tmp_path: Path) -> None:
    folder = tmp_path / "grok-2"
    assert make(folder, "--shape", "grok-2", *TINY) == 0
    spec = parse_spec(json.loads((folder / "config.json").read_text()))
    assert (spec.generation, spec.mlp_size, spec.final_cap, spec.temperature_len) == (2, 512, 50.0, 1024)
    files = weight_files(folder)
    tensors = dict(each_once(whole_weights(files)))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes(spec)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name in ("w1", "w2", "w3"):
        weight = tensors[f"model.layers.1.block_sparse_moe.experts.3.{name}.weight"]
        assert float(weight.float().std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    moe = inspect_checkpoint(str(folder))
    assert moe is not None and (moe.num_layers, moe.num_experts) == (2, 4)
    assert len(dict(hosted_weights(files, (2,), 4))) == 2 * 3
    assert find_tokenizer(folder) == folder / "tokenizer.json"
    convert_hub(folder, tmp_path / "int4", "int4")


@pytest.mark.parametrize("shape", ["grok-1", "grok-2"])
def test_hugging_faces_layout(tmp_path: Path, shape: str) -> None:
    folder = tmp_path / "hf"
    assert make(folder, "--shape", shape, "--format", "hf", *TINY) == 0
    spec = parse_spec(json.loads((folder / "config.json").read_text()))
    assert (spec.is_grok2, spec.num_layers, spec.num_heads) == (shape == "grok-2", 2, 6)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / file)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes(spec)
    assert inspect_checkpoint(str(folder)) is not None


def test_numbers_are_made_slab_by_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_checkpoint, "SLAB_NUMBERS", 1000)
    sizes = {"hidden_size": 32, "expert_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    checkpoint = grok_checkpoint("grok-1", "ckpt-0", sizes | {"vocab_size": 300})
    steps: list[int] = []
    checkpoint.write(tmp_path, 0, lambda progress: steps.append(progress.done_bytes))
    assert max(np.diff(steps)) <= 4000
    assert steps[-1] == checkpoint.num_bytes == sum(path.stat().st_size for path in tmp_path.glob("tensor*"))
    convert_ckpt0(tmp_path, tmp_path / "out", config=checkpoint.config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "grok-1", "--format", "tp8"], "grok-1 is written as ckpt-0 or hf, not as tp8"),
        (["--shape", "grok-2", "--format", "ckpt-0"], "grok-2 is written as tp8 or hf"),
        (["--format", "ckpt-0"], "mixtral is written as hf"),
        (["--head-dim", "64"], "--head-dim: is for Grok"),
        (["--shape", "grok-1", *TINY, "--layers", "0"], "--layers: is 0, must be 1 or more"),
        (["--shape", "grok-2", *TINY, "--vocab", "200"], "--vocab: is 200"),
        (["--shape", "grok-1", *TINY, "--expert", "260"], "the size of expert is 260, not a multiple of 8"),
        (["--shape", "grok-1", *TINY, "--kv-heads", "4"], "not divisible by 4 key-value heads"),
        (["--shape", "grok-1", *TINY, "--top-k", "5"], "num_experts_per_tok is 5 with 4 experts"),
        (["--shape", "grok-1", *TINY, "--head-dim", "9"], "cannot be rotated"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], options, words: str) -> None:
    assert make(tmp_path / "model", *options) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    assert make(tmp_path / "model", "--shape", "grok-1", "--layers", "1") == 2
    assert "has 0.00 GB left, the checkpoint needs 8.21 GB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensor00000_000").write_text("mine")
    assert make(tmp_path, "--shape", "grok-1", *TINY) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tensor00000_000"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert make(tmp_path / "notes.txt/model", "--shape", "grok-1", *TINY) == 2
    assert "notes.txt/.model.partial: Not a directory" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "make-model", "--help"])
    text = capsys.readouterr().out
    assert "--shape {mixtral,grok-1,grok-2}" in text and "--format {hf,ckpt-0,tp8}" in text
    assert "switchyard bench make-model /tmp/grok1-wide --shape grok-1 --layers 1 " in text
