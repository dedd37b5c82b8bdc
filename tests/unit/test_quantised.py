"""Integers with scales: the format is compressed-tensors', as its own library reads and writes it."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from cluster.errors import CheckpointError, ConfigError
from model.quantised import (
    METADATA_KEY,
    Format,
    Quantised,
    common_group,
    config_format,
    dequantise,
    format_of,
    logical_shapes,
    pack,
    plain,
    quantise,
    unpack,
    vllm_config,
)


def integers(bits: int, rows: int = 6, columns: int = 64) -> torch.Tensor:
    half = 1 << bits - 1
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_that_of_compressed_tensors(bits: int) -> None:
    values = integers(bits)
    packed = pack(values, bits)
    assert torch.equal(packed, pack_to_int32(values, bits))
    assert torch.equal(unpack(packed, bits), values)
    assert torch.equal(unpack_from_int32(packed, bits, values.shape), values)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_near(bits: int) -> None:
    torch.manual_seed(bits)
    weight_OI = torch.randn(40, 256)
    weight_OI[3] = 0
    values, scales = quantise(weight_OI, bits, 128)
    assert (values.min(), values.max()) == (-(1 << bits - 1), (1 << bits - 1) - 1)
    found = plain(Quantised(Format(bits, torch.float32), pack(values, bits), scales))
    # Half a step, and at the ends of the range what rounding the scale to eight bits has moved them.
    step = scales.float().repeat_interleave(128, dim=1)
    assert ((found - weight_OI).abs() <= (0.5 + 2.0 ** (bits - 9)) * step).all()
    assert not found[3].any()


def test_dequantise() -> None:
    weight_OI = torch.tensor([[1, 2, 3, 4], [-127, 0, 127, -1]], dtype=torch.int8)
    scales_OG = torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.bfloat16)
    expected = torch.tensor([[0.5, 1.0, 6.0, 8.0], [-127.0, 0.0, 31.75, -0.25]])
    assert torch.equal(dequantise(weight_OI, scales_OG, torch.float32), expected)
    with pytest.raises(ValueError, match="do not fit"):
        dequantise(weight_OI, scales_OG[:1], torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        dequantise(weight_OI[:, :3], scales_OG, torch.float32)


def test_groups() -> None:
    assert common_group([6144, 32768], "x") == 128
    assert common_group([256, 320], "x") == 64
    assert common_group([128, 344], "x") == 8
    with pytest.raises(ConfigError, match="x: experts with 128, 20 inputs cannot be packed"):
        common_group([128, 20], "x")


def test_an_unknown_scheme_is_refused() -> None:
    assert format_of(None, "file") is None
    assert format_of({"format": "pt"}, "file") is None
    assert format_of({METADATA_KEY: "int4-float32"}, "file") == Format(4, torch.float32)
    with pytest.raises(CheckpointError, match="file is quantised as 'int3'"):
        format_of({METADATA_KEY: "int3"}, "file")
    assert config_format({}, Path("c")) is None
    assert config_format({METADATA_KEY: {"experts": "int8", "product": "bfloat16"}}, Path("c")) == Format(
        8, torch.bfloat16
    )
    for wrong in ("int8", {"experts": "int2", "product": "float32"}):
        with pytest.raises(CheckpointError, match="c is quantised as"):
            config_format({METADATA_KEY: wrong}, Path("c"))


def test_packed_matrices_stand_for_plain_ones() -> None:
    header = {
        "e.w1.weight_packed": {"shape": [8, 4]},
        "e.w1.weight_scale": {"shape": [8, 1]},
        "e.w1.weight_shape": {"shape": [2]},
        "norm.weight": {"shape": [8]},
    }
    assert logical_shapes(header, Format(4, torch.float32)) == {"e.w1.weight": (8, 32), "norm.weight": (8,)}
    assert logical_shapes(header, None)["e.w1.weight_packed"] == (8, 4)


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_compressed_tensors_understands_the_config(precision, bits: int) -> None:
    """As vLLM parses it: weight-only, symmetric, in groups (vllm .. compressed_tensors.py, _is_wNa16_group_channel)."""
    from compressed_tensors.quantization import QuantizationConfig

    parsed = QuantizationConfig.model_validate(vllm_config(precision, 128))
    scheme = parsed.config_groups["group_0"]
    assert scheme.weights is not None
    assert (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.symmetric) == (bits, 128, True)
    assert (scheme.weights.strategy, scheme.weights.dynamic, scheme.input_activations) == ("group", False, None)
