"""What an engine's compilation is told when its experts are elsewhere."""

import pytest

from cluster.errors import ConfigError
from model.cuda_graphs import around_moe_layers
from tests.golden import GOLDENS

MIXTRAL, GPT_OSS = str(GOLDENS / "mixtral-tiny"), str(GOLDENS / "gptoss-tiny")


def test_graphs_end_at_attention_and_at_moe_layers():
    told = around_moe_layers({"cudagraph_capture_sizes": [1, 2]}, MIXTRAL)
    assert told["cudagraph_mode"] == "PIECEWISE" and told["cudagraph_capture_sizes"] == [1, 2]
    assert {"vllm::unified_attention_with_output", "vllm::moe_forward", "vllm::moe_forward_shared"} <= set(
        told["splitting_ops"]
    )
    again = around_moe_layers(told | {"cudagraph_mode": "NONE"}, MIXTRAL)
    assert again["splitting_ops"] == told["splitting_ops"] and again["cudagraph_mode"] == "NONE"


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE", 2])
def test_no_graph_may_hold_a_moe_layer(mode):
    with pytest.raises(ConfigError, match=r"cudagraph_mode: is .*Use PIECEWISE or NONE"):
        around_moe_layers({"cudagraph_mode": mode}, MIXTRAL)
    with pytest.raises(ConfigError, match="must be a mapping"):
        around_moe_layers("-O3", MIXTRAL)


def test_a_model_that_slices_answers_is_not_compiled():
    assert around_moe_layers({}, GPT_OSS) == {"mode": 0, "cudagraph_mode": "NONE"}
