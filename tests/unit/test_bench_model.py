"""The random benchmark checkpoint: complete, loadable, the size it says, never over something else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import ConfigError
from model.safetensors_writer import SafetensorsWriter
from ops.bench import make_model as mm

TINY = mm.ModelShape(hidden=16, expert=24, layers=2, experts=4, top_k=2, heads=4, kv_heads=2, vocab=300)


def test_the_default_is_the_benchmark_model():
    shape = mm.ModelShape()
    assert (shape.hidden, shape.expert, shape.layers, shape.experts, shape.top_k) == (1024, 2048, 12, 8, 2)
    assert 1.2e9 < mm.mixtral_checkpoint(shape).num_bytes < 1.5e9


def test_every_tensor_is_there_in_bfloat16_and_sane(tmp_path):
    folder = tmp_path / "new" / "model"
    mm.make_model(folder, TINY)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        loaded = load_file(folder / file)
        assert all(index["weight_map"][name] == file for name in loaded)
        tensors |= loaded
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: size for shard in mm.shard_plan(TINY) for name, size in shard.items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in tensors.values())
    for name, num_inputs in (("lm_head", TINY.hidden), ("model.layers.0.block_sparse_moe.experts.0.w2", TINY.expert)):
        assert float(tensors[f"{name}.weight"].float().std()) == pytest.approx(num_inputs**-0.5, rel=0.15)
    assert float(tensors["model.norm.weight"].float().mean()) == pytest.approx(1.0, abs=0.1)


def test_equal_seeds_give_equal_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        mm.make_model(tmp_path / name, TINY, seed)
    a, b, c = ((tmp_path / name / "model-00001-of-00003.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_the_tokenizer_encodes_any_text_and_decodes_every_token(tmp_path):
    from tokenizers import Tokenizer

    mm.write_tokenizer(tmp_path, 32000)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Hello, wörld!\n漢字"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == 32000
    words = {tokenizer.decode([token]) for token in range(259, 32000)}
    assert len(words) == 32000 - 259
    assert "" not in words


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        mm.make_model(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsWriter, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mm.make_model(tmp_path / "model", TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConfigError, match="needs"):
        mm.make_model(tmp_path / "model", TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layers": 0}, "--layers"),
        ({"heads": 5}, "not a multiple"),
        ({"kv_heads": 3}, "--kv-heads"),
        ({"top_k": 9}, "--top-k"),
        ({"vocab": 100}, "--vocab"),
        ({"hidden": 12, "heads": 4}, "rotated"),
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        mm.ModelShape(**wrong)
