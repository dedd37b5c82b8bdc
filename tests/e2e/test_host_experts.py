"""Experts in host memory where vLLM's CPU kernels are missing, as in its build for GPUs."""

from pathlib import Path

import pytest
import torch

from model.host_experts import experts_of
from tests import expert_answers
from tests.golden import GOLDENS


@pytest.mark.usefixtures("nursery")
def test_a_worker_without_a_gpu_computes_plain_experts(tmp_path: Path) -> None:
    folder = GOLDENS / "mixtral-tiny"
    found = expert_answers.answers(
        folder, tmp_path, dtype="float32", experts=(2, 6), tokens=37, in_host_memory=True, gpu_build=True
    )
    assert found["device"] == "cpu"
    truth = expert_answers.expected(folder, "float32", 37, range(2, 6))
    assert sorted(truth) == sorted(found["answers"])
    for layer, expected_TD in truth.items():
        torch.testing.assert_close(found["answers"][layer].double(), expected_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("nursery")
def test_gpt_oss_experts_have_biases_and_their_own_activation_as_in_vllms_kernels(tmp_path: Path) -> None:
    folder = GOLDENS / "gptoss-tiny"
    order = {"dtype": "float32", "experts": (0, 8), "tokens": 9, "in_host_memory": True}
    plain = expert_answers.answers(folder, tmp_path, gpu_build=True, **order)["answers"]
    vllms = expert_answers.answers(folder, tmp_path, gpu_build=False, **order)["answers"]
    for layer, answer_TD in plain.items():
        torch.testing.assert_close(answer_TD, vllms[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_a_token_may_choose_an_expert_twice(activation: str) -> None:
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
    }
    w13_EGD, w2_EDF = torch.randn(2, 12, 4), torch.randn(2, 4, 6)
    x_TD, out_TD = torch.randn(3, 4), torch.full((3, 4), torch.nan)
    ids_TK = torch.tensor([[1, 1], [0, -1], [-1, -1]], dtype=torch.int32)
    weights_TK = torch.tensor([[0.25, 0.5], [1.0, 9.0], [9.0, 9.0]])
    experts_of(w13_EGD, w2_EDF, None, None, activation)(out_TD, x_TD, weights_TK, ids_TK)

    def expert(number: int, x_D: torch.Tensor) -> torch.Tensor:
        gate_F, up_F = (w13_EGD[number] @ x_D).chunk(2)
        return w2_EDF[number] @ (functions[activation](gate_F) * up_F)

    torch.testing.assert_close(out_TD[0], 0.75 * expert(1, x_TD[0]))
    torch.testing.assert_close(out_TD[1], expert(0, x_TD[1]))
    assert not out_TD[2].any()
