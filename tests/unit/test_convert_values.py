"""What a conversion of ckpt-0 writes: the right numbers under the right names, in the order in which they are read."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import CheckpointError
from model import ckpt0_pieces
from model.expert_weights import dense_weights, hosted_weights, read_header
from model.grok_checkpoint import convert_ckpt0, read_tensor
from model.integer_experts import can_compute, loaded_bytes_per_stored
from model.moe_spec import inspect_checkpoint
from model.quantised import METADATA_KEY, unpack
from model.tensor_sets import each_once
from tests import ckpt0, golden

CKPT = golden.GOLDENS / "grok1-m2/int8/ckpt-0"
M2 = golden.config("grok1-m2")
STRING_ORDER = (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors as an engine and a worker of all experts read them."""
    files = sorted(folder.glob("*.safetensors"))
    return dict(dense_weights(files)) | dict(hosted_weights(files, range(8), 8))


def dequantised(file: ckpt0.Encoded, exact: bool) -> np.ndarray:
    """The [.., out, in] product, by numpy from the encoded bytes alone."""
    weight = np.frombuffer(file.data, np.int8).reshape(file.shape)
    bits = np.frombuffer(file.scales_data or b"", "<u2").astype("<u4") << 16
    scales = bits.view("<f4").reshape(file.scales_shape)
    product = weight.astype(np.float32) * np.repeat(scales, file.shape[-2] // file.scales_shape[-2], axis=-2)
    if not exact:
        bits = product.view("<u4")
        bits = bits + 0x7FFF + ((bits >> 16) & 1)  # to bfloat16, ties to even
        product = (bits & 0xFFFF0000).astype("<u4").view("<f4")
    return np.swapaxes(product, -1, -2)


@pytest.mark.parametrize("experts", ["bf16", "int8"])
@pytest.mark.parametrize("exact", [False, True])
def test_twelve_layers_in_string_order(tmp_path: Path, exact: bool, experts: str) -> None:
    """Eight rows of scales, and heads that do not add up to the hidden size."""
    files = ckpt0.random_files(12)
    source = ckpt0.write(tmp_path / "ckpt-0", files)
    convert_ckpt0(source, tmp_path / "out", exact=exact, config=ckpt0.CONFIG, experts=experts)
    found = weights(tmp_path / "out")
    assert len(found) == 2 + 12 * (4 + 4 + 1 + 3 * ckpt0.EXPERTS)
    for place, layer in enumerate(STRING_ORDER):
        prefix = f"model.layers.{layer}."
        assert found[f"{prefix}pre_moe_norm.weight"].unique().tolist() == [place + 1.0]
        here = files[2 + 12 * place : 14 + 12 * place]
        for kind, name in ((0, "w1"), (1, "w2"), (2, "w3")):
            for expert, expected in enumerate(dequantised(here[kind], exact)):
                tensor = found[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"]
                assert tensor.dtype == (torch.float32 if exact else torch.bfloat16)
                np.testing.assert_array_equal(tensor.float().numpy(), expected)
        for kind, name in ((3, "k_proj"), (4, "o_proj"), (5, "q_proj"), (6, "v_proj")):
            tensor = found[f"{prefix}self_attn.{name}.weight"]
            np.testing.assert_array_equal(tensor.float().numpy(), dequantised(here[kind], exact))
        gate = np.frombuffer(here[11].data, "<f4").reshape(here[11].shape).T
        np.testing.assert_array_equal(found[f"{prefix}block_sparse_moe.gate.weight"].numpy(), gate)
    embeddings = np.frombuffer(files[0].data, "<f4").reshape(files[0].shape)
    np.testing.assert_array_equal(found["model.embed_tokens.weight"].numpy(), embeddings)
    spec = inspect_checkpoint(str(tmp_path / "out"), "float32")
    assert spec is not None
    assert (spec.num_layers, spec.num_experts, spec.hidden_size) == (12, ckpt0.EXPERTS, ckpt0.HIDDEN)


def test_int8_keeps_the_released_numbers(tmp_path: Path) -> None:
    files = ckpt0.random_files(1)
    convert_ckpt0(ckpt0.write(tmp_path / "ckpt-0", files), tmp_path / "out", config=ckpt0.CONFIG, experts="int8")
    stored = load_file(tmp_path / "out/model-experts-layer-00000.safetensors")
    weight = np.frombuffer(files[3].data, np.int8).reshape(files[3].shape)
    scales = np.frombuffer(files[3].scales_data or b"", "<i2").reshape(files[3].scales_shape)
    for expert in range(ckpt0.EXPERTS):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"
        np.testing.assert_array_equal(unpack(stored[f"{name}_packed"], 8).numpy(), weight[expert].T)
        np.testing.assert_array_equal(stored[f"{name}_scale"].view(torch.int16).numpy(), scales[expert].T)
        assert stored[f"{name}_shape"].tolist() == [ckpt0.HIDDEN, ckpt0.FFN]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config[METADATA_KEY] == {"experts": "int8", "scales": "bfloat16", "product": "bfloat16"}
    assert "quantization_config" not in config  # four inputs to a scale are nothing that vLLM computes


def test_scales_are_repeated_where_vllm_can_load_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups of two, as the released model's widths are to groups of 128."""
    monkeypatch.setattr(ckpt0_pieces, "GROUP_SIZE", 2)
    files = ckpt0.random_files(1)
    source = ckpt0.write(tmp_path / "ckpt-0", files)
    convert_ckpt0(source, tmp_path / "out", config=ckpt0.CONFIG, experts="int8", exact=True)
    stored = load_file(tmp_path / "out/model-experts-layer-00000.safetensors")
    scales = np.frombuffer(files[3].scales_data or b"", "<i2").reshape(files[3].scales_shape)
    repeated = stored["model.layers.0.block_sparse_moe.experts.1.w2.weight_scale"]
    np.testing.assert_array_equal(repeated.view(torch.int16).numpy(), np.repeat(scales[1].T, 2, axis=1))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 2
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    np.testing.assert_array_equal(weights(tmp_path / "out")[name].numpy(), dequantised(files[3], True)[1])


def test_int4_is_near_the_released_weights(tmp_path: Path) -> None:
    convert_ckpt0(CKPT, tmp_path / "int4", config=M2, experts="int4")
    convert_ckpt0(CKPT, tmp_path / "exact", config=M2, experts="int8", exact=True)
    int4, exact = weights(tmp_path / "int4"), weights(tmp_path / "exact")
    assert int4.keys() == exact.keys()
    for name, tensor in exact.items():
        if ".experts." in name:
            limit = 0.54 / 7.5 * tensor.unflatten(1, (-1, 8)).abs().amax(-1)  # groups of 8, for 344 inputs
            assert ((int4[name] - tensor).unflatten(1, (-1, 8)).abs().amax(-1) <= limit).all()
    spec = inspect_checkpoint(str(tmp_path / "int4"), "float32")
    assert spec is not None and spec.stored is not None and spec.stored.bits == 4


def test_the_modes_agree_on_the_golden_model(tmp_path: Path) -> None:
    """int8 on disk becomes what bf16 on disk is; exact products round to the same."""
    for mode, options in {"bf16": {}, "int8": {"experts": "int8"}, "exact": {"exact": True, "experts": "int8"}}.items():
        convert_ckpt0(CKPT, tmp_path / mode, config=M2, **options)
    plain, int8, exact = (weights(tmp_path / mode) for mode in ("bf16", "int8", "exact"))
    assert plain.keys() == int8.keys() == exact.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, int8[name])
        assert torch.equal(tensor, exact[name].to(tensor.dtype))
    down = read_tensor(CKPT / "tensor00003_000", exact=True)
    assert torch.equal(exact["model.layers.0.block_sparse_moe.experts.5.w2.weight"], down[5].T)


@pytest.mark.parametrize("experts", ["bf16", "int8"])
def test_an_experts_bytes_are_one_run(tmp_path: Path, experts: str) -> None:
    convert_ckpt0(CKPT, tmp_path, config=M2, experts=experts)
    header = read_header(tmp_path / "model-experts-layer-00002.safetensors")
    order = sorted(header, key=lambda name: header[name]["data_offsets"][0])
    assert all(header[one]["data_offsets"][1] == header[two]["data_offsets"][0] for one, two in pairwise(order))
    numbers = [int(name.split(".experts.")[1].split(".")[0]) for name in order]
    assert numbers == sorted(numbers)
    kinds = [name.split(".")[-2] for name in order if name.endswith((".weight", ".weight_packed"))]
    assert kinds == ["w1", "w3", "w2"] * 8
    read = [name for name, _ in hosted_weights([tmp_path / "model-experts-layer-00002.safetensors"], (2, 3), 8)]
    assert [name.split(".experts.")[1] for name in read] == [
        f"{local}.{which}.weight" for local in (0, 1) for which in ("w1", "w3", "w2")
    ]
    dense = [name for path in tmp_path.glob("model-dense-*") for name in read_header(path)]
    assert not any(".experts." in name for name in dense)


def test_an_array_in_fortran_order(tmp_path: Path) -> None:
    files = ckpt0.random_files(1)
    convert_ckpt0(ckpt0.write(tmp_path / "c", files), tmp_path / "from-c", config=ckpt0.CONFIG)

    def as_fortran(number: int, data: bytes) -> bytes:
        dtype = b"<f4" if files[number].scales_data is None else b"i1"
        values = np.frombuffer(files[number].data, dtype.decode()).reshape(files[number].shape)
        at = data.index(files[number].data)
        flag = data.rindex(b"\x89B", 0, at)
        assert at - flag == 6
        data = data[:flag] + b"\x88" + data[flag + 1 :]
        return data[:at] + values.tobytes("F") + data[at + values.nbytes :]

    convert_ckpt0(ckpt0.write(tmp_path / "f", files, as_fortran), tmp_path / "from-f", config=ckpt0.CONFIG)
    c, f = weights(tmp_path / "from-c"), weights(tmp_path / "from-f")
    assert all(torch.equal(f[name], tensor) for name, tensor in c.items())


def test_a_config_that_contradicts_the_files_is_refused(tmp_path: Path) -> None:
    for wrong in ({"emb_size": 256}, {"num_experts": 4}, {"num_q_heads": 8}, {"key_size": 48}, {"num_layers": 4}):
        with pytest.raises(CheckpointError, match=r"tensor\d{5}_000|heads of"):
            convert_ckpt0(CKPT, tmp_path / "out", config=M2 | wrong)


def test_what_a_file_takes_in_memory(tmp_path: Path) -> None:
    convert_ckpt0(CKPT, tmp_path / "int8", config=M2, experts="int8")
    convert_ckpt0(CKPT, tmp_path / "exact", config=M2, experts="int8", exact=True)
    has_kernel = can_compute("gelu", torch.float32)
    for mode, plain in (("int8", 2), ("exact", 4)):
        path = tmp_path / mode / "model-experts-layer-00000.safetensors"
        assert loaded_bytes_per_stored(path) == (1 if has_kernel else plain)
    assert loaded_bytes_per_stored(tmp_path / "int8/model-dense-layer-00000.safetensors") == 1


def test_tokenizer_and_licence_come_along(tmp_path: Path) -> None:
    source = tmp_path / "grok-1"
    ckpt0.write(source / "ckpt-0", ckpt0.random_files(1))
    (source / "LICENSE.txt").write_text("terms")
    (source / "ckpt-0/tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "LICENSE").write_text("of something else")
    convert_ckpt0(source, tmp_path / "out", config=ckpt0.CONFIG)
    assert (tmp_path / "out/LICENSE.txt").read_text() == "terms"
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"pieces"
    assert not (tmp_path / "out/LICENSE").exists()


def test_a_loader_that_knows_no_packing_is_stopped(tmp_path: Path) -> None:
    convert_ckpt0(CKPT, tmp_path, config=M2, experts="int8")
    stored = load_file(tmp_path / "model-experts-layer-00000.safetensors")
    with pytest.raises(CheckpointError, match="load_format=switchyard-whole"):
        list(each_once(stored.items()))
    assert len(list(each_once(weights(tmp_path).items()))) == 2 + 3 * 33
