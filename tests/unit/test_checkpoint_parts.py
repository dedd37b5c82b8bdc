"""Reading parts of a checkpoint: names, headers, slices. Real safetensors files, no vLLM."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import CheckpointError
from model.expert_weights import dense_weights, hosted_weights, is_expert_tensor, moe_layer_indices, read_header
from model.moe_spec import inspect_checkpoint

NUM_EXPERTS = 4
CONFIG = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "hidden_size": 8, "torch_dtype": "float32"}


@pytest.fixture
def checkpoint(tmp_path):
    tensors = {"model.embed.weight": torch.zeros(3, 8), "model.layers.1.mlp.shared_experts.up.weight": torch.ones(8, 8)}
    for layer in (1, 10, 2):
        for expert in range(NUM_EXPERTS):
            tensors[f"model.layers.{layer}.mlp.experts.{expert}.w1.weight"] = torch.full((6, 8), 10.0 * layer + expert)
    tensors["model.layers.3.mlp.experts.gate_up_proj"] = torch.arange(NUM_EXPERTS * 6 * 8.0).reshape(NUM_EXPERTS, 6, 8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "routed"),
    [
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", True),
        ("model.layers.0.mlp.experts.gate_up_proj", True),
        ("transformer.blocks.0.ffn.experts.mlp.w1", True),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", False),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", False),
        ("model.layers.0.block_sparse_moe.gate.weight", False),
    ],
)
def test_routed_experts_are_told_by_name(name, routed):
    assert is_expert_tensor(name) is routed


def test_layers_are_ordered_as_numbers():
    names = [f"model.layers.{layer}.mlp.experts.0.w1.weight" for layer in (10, 2, 1)]
    assert moe_layer_indices([*names, "model.layers.7.mlp.up_proj.weight"]) == [1, 2, 10]


def test_an_engine_reads_no_expert(checkpoint):
    names = [name for name, _ in dense_weights([str(checkpoint / "model.safetensors")])]
    assert sorted(names) == ["model.embed.weight", "model.layers.1.mlp.shared_experts.up.weight"]


def test_a_worker_reads_only_its_own_renumbered(checkpoint):
    parts = dict(hosted_weights([str(checkpoint / "model.safetensors")], (3, 1), NUM_EXPERTS))
    assert parts["model.layers.10.mlp.experts.0.w1.weight"].unique().tolist() == [103.0]
    assert parts["model.layers.10.mlp.experts.1.w1.weight"].unique().tolist() == [101.0]
    stacked = torch.arange(NUM_EXPERTS * 6 * 8.0).reshape(NUM_EXPERTS, 6, 8)
    assert torch.equal(parts["model.layers.3.mlp.experts.gate_up_proj"], stacked[[3, 1]])
    assert len(parts) == 3 * 2 + 1


def test_spec_of_a_checkpoint(checkpoint):
    spec = inspect_checkpoint(str(checkpoint), "float32")
    assert (spec.num_layers, spec.num_experts, spec.top_k, spec.hidden_size) == (4, NUM_EXPERTS, 2, 8)
    assert spec.dtype == torch.float32
    assert spec.fingerprint == inspect_checkpoint(str(checkpoint), "float32").fingerprint
    assert spec.fingerprint != inspect_checkpoint(str(checkpoint), "bfloat16").fingerprint


def test_nested_text_config_is_understood(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps({"text_config": CONFIG}))
    assert inspect_checkpoint(str(checkpoint), "float32").top_k == 2


def test_dense_model_has_no_spec(tmp_path):
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 2}))
    assert inspect_checkpoint(str(tmp_path)) is None


def break_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 32)


def truncate(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\x00")


def lose_file(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))


def break_config(folder):
    (folder / "config.json").write_text("{not json")


def list_config(folder):
    (folder / "config.json").write_text("[]")


def lose_config(folder):
    (folder / "config.json").unlink()


def forget_top_k(folder):
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "num_experts": 4}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_header, "not a complete safetensors file"),
        (truncate, "not a complete safetensors file"),
        (lose_file, "model-2.safetensors"),
        (break_config, "not valid JSON"),
        (list_config, "not a JSON object"),
        (lose_config, "no config.json"),
        (forget_top_k, "top_k=0"),
    ],
)
def test_a_damaged_checkpoint_is_named(checkpoint, damage, words):
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=words):
        inspect_checkpoint(str(checkpoint))


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        inspect_checkpoint(str(tmp_path / "nowhere"))


def test_header_is_read_without_tensor_data(checkpoint):
    header = read_header(checkpoint / "model.safetensors")
    assert header["model.embed.weight"]["shape"] == [3, 8]
