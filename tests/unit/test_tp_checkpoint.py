"""Grok-2 as published, its experts cut into eight parts: read whole, or refused by the name of what is missing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError
from model.expert_weights import dense_weights, hosted_weights, is_expert_tensor, whole_weights
from model.moe_spec import inspect_checkpoint, weight_files
from model.tensor_sets import each_once
from model.tp_shards import assembled_shape, shard_sets
from tests import golden

TP8 = golden.GOLDENS / "grok2-tiny/tp8"
WHOLE = golden.GOLDENS / "grok2-tiny/unsharded"
W2_RANK5 = "pytorch_model-00007-TP-005.safetensors"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TP8, tmp_path / "tp8"))


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(WHOLE / "model.safetensors")


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_an_engine_gets_the_dense_tensors(expected: dict[str, torch.Tensor]) -> None:
    dense = {name: tensor for name, tensor in expected.items() if not is_expert_tensor(name)}
    assert equal(dict(dense_weights(weight_files(TP8))), dense)


def test_an_engine_that_keeps_its_experts_gets_all(expected: dict[str, torch.Tensor]) -> None:
    assert equal(dict(each_once(whole_weights(weight_files(TP8)))), expected)


@pytest.mark.parametrize("experts", [range(8), (5,), (7, 0, 3)])
def test_a_worker_gets_its_experts_whole(experts, expected: dict[str, torch.Tensor]) -> None:
    names = {f".experts.{local}.": f".experts.{expert}." for local, expert in enumerate(experts)}
    found = dict(hosted_weights(weight_files(TP8), experts, 8))
    assert len(found) == 3 * 3 * len(experts)
    for name, tensor in found.items():
        local = next(text for text in names if text in name)
        assert torch.equal(tensor, expected[name.replace(local, names[local])])


def test_a_worker_opens_eight_parts_and_reads_only_its_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    from model import tensor_sets

    asked: list[str] = []
    real = tensor_sets.safe_open

    class Spy:
        def __init__(self, *args, **kwargs):
            self.inner = real(*args, **kwargs)

        def __enter__(self):
            self.opened = self.inner.__enter__()
            return self

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def get_tensor(self, name):
            asked.append(name)
            return self.opened.get_tensor(name)

    monkeypatch.setattr(tensor_sets, "safe_open", Spy)
    assert len(dict(hosted_weights(weight_files(TP8), (5,), 8))) == 9
    assert len(asked) == 9 * 8
    assert all(".experts.5." in name for name in asked)


def test_the_spec_is_that_of_the_whole_model() -> None:
    parts, whole = (inspect_checkpoint(str(folder), "float32") for folder in (TP8, WHOLE))
    assert parts is not None
    assert whole is not None
    assert (parts.num_layers, parts.num_experts, parts.hidden_size) == (3, 8, 128)
    assert (whole.num_layers, whole.num_experts, whole.hidden_size) == (3, 8, 128)


@pytest.mark.parametrize("path", sorted(TP8.glob("*.safetensors")), ids=lambda path: path.name[14:-12])
def test_a_missing_file_is_named(copy: Path, path: Path) -> None:
    (copy / path.name).unlink()
    number = path.name.split("-")[1]
    with pytest.raises(CheckpointError, match=path.name if "common" not in path.name else f"pytorch_model-{number}-TP"):
        inspect_checkpoint(str(copy))
    if "common" not in path.name:
        with pytest.raises(CheckpointError, match=path.name):
            list(dense_weights(sorted(copy.glob("*.safetensors"))))


def test_a_whole_rank_missing_does_not_add_up(copy: Path) -> None:
    for path in copy.glob("*-TP-007.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"as \[112, 128\], config.json calls for \[128, 128\]"):
        inspect_checkpoint(str(copy))


def test_a_part_of_another_shape_is_named(copy: Path) -> None:
    tensors = load_file(copy / W2_RANK5)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, copy / W2_RANK5)
    for read in (lambda: inspect_checkpoint(str(copy)), lambda: list(hosted_weights(weight_files(copy), (3,), 8))):
        with pytest.raises(CheckpointError, match=f"{W2_RANK5} has {name}"):
            read()


def test_a_part_without_a_tensor_is_named(copy: Path) -> None:
    tensors = load_file(copy / W2_RANK5)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    del tensors[name]
    save_file(tensors, copy / W2_RANK5)
    for read in (lambda: inspect_checkpoint(str(copy)), lambda: list(hosted_weights(weight_files(copy), (3,), 8))):
        with pytest.raises(CheckpointError, match=f"{W2_RANK5}.*{name}"):
            read()


@pytest.mark.parametrize("cut", [1, 100, 50_000, 101_000])
def test_a_truncated_part_is_named(copy: Path, cut: int) -> None:
    data = (copy / W2_RANK5).read_bytes()
    (copy / W2_RANK5).write_bytes(data[:-cut])
    for read in (lambda: inspect_checkpoint(str(copy)), lambda: list(hosted_weights(weight_files(copy), (3,), 8))):
        with pytest.raises(CheckpointError, match=W2_RANK5):
            read()


def test_a_config_of_another_model_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.3"):
        inspect_checkpoint(str(copy))
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(CheckpointError, match="00003-TP-common"):
        inspect_checkpoint(str(copy))


def test_loading_by_name_alone_is_stopped() -> None:
    """What vLLM's own loader would read: every part under the same name."""
    parts = [item for path in weight_files(TP8) for item in load_file(path).items()]
    with pytest.raises(CheckpointError, match="stored in parts"):
        list(each_once(parts))


def test_sets_of_files() -> None:
    sets = shard_sets(weight_files(TP8))
    assert sorted(len(files) for files in sets) == [1] * 15 + [8] * 3
    assert shard_sets([Path("b.safetensors"), Path("a.safetensors")]) == [
        (Path("a.safetensors"),),
        (Path("b.safetensors"),),
    ]
    assert shard_sets([]) == []


def test_how_parts_add_up() -> None:
    files = [Path(f"x-TP-{rank:03d}.safetensors") for rank in range(2)]
    assert assembled_shape("m.experts.0.w1.weight", [[4, 6], [4, 6]], files) == (8, 6)
    assert assembled_shape("m.experts.0.w2.weight", [[6, 4], [6, 4]], files) == (6, 8)
    assert assembled_shape("anything", [[3]], files[:1]) == (3,)
    with pytest.raises(CheckpointError, match="how it was cut is not known"):
        assembled_shape("m.pre_moe_norm.weight", [[4], [4]], files)
