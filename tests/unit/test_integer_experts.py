"""The kernel for integer experts equals dequantised weights in torch, for all formats, groups and activations."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from model.integer_experts import IntegerExperts, can_compute
from model.quantised import Format, Quantised, pack, plain

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
}
EXPERTS, TOP_K = 3, 2

pytestmark = pytest.mark.skipif(
    not can_compute("silu", torch.float32), reason="Switchyard was installed without a C compiler"
)


def random_matrix(rows: int, columns: int, groups: int, stored: Format) -> Quantised:
    half = 1 << stored.bits - 1
    integers = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    scales = (torch.rand(rows, groups) * 0.1 / half).to(torch.bfloat16)
    return Quantised(stored, pack(integers, stored.bits), scales)


def random_layer(hidden: int, inner: int, groups: tuple[int, int], stored: Format) -> dict[tuple[int, str], Quantised]:
    """(expert, matrix) -> the matrix; groups: of a row of w1 and w3, and of w2."""
    sizes = {"w1": (inner, hidden, groups[0]), "w3": (inner, hidden, groups[0]), "w2": (hidden, inner, groups[1])}
    return {(expert, name): random_matrix(*size, stored) for expert in range(EXPERTS) for name, size in sizes.items()}


def loaded(
    matrices: dict[tuple[int, str], Quantised],
    activation: str,
    dtype: torch.dtype = torch.float32,
    num_threads: int = 2,
) -> IntegerExperts:
    hidden, inner = len(matrices[0, "w2"].scales_OG), len(matrices[0, "w1"].scales_OG)
    experts = IntegerExperts(EXPERTS, hidden, inner, activation, dtype, num_threads)
    for (expert, name), matrix in matrices.items():
        experts.put(expert, name, matrix)
    return experts


def call(experts: IntegerExperts, x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    out_TD = torch.full_like(x_TD, torch.nan)
    experts.ready()(out_TD, x_TD, weights_TK, ids_TK)
    return out_TD


def random_call(num_tokens: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(num_tokens)]).int()
    return torch.randn(num_tokens, hidden), torch.rand(num_tokens, TOP_K), ids


def expected(matrices, activation, x_TD, weights_TK, ids_TK) -> torch.Tensor:
    """The same in float64; experts numbered -1 add nothing."""
    x_TD = x_TD.double()
    out_TD = torch.zeros_like(x_TD)
    for expert in range(EXPERTS):
        w1, w3, w2 = (plain(matrices[expert, name]).double() for name in ("w1", "w3", "w2"))
        share_T1 = (weights_TK * (ids_TK == expert)).sum(1, keepdim=True)
        out_TD += share_T1 * ((ACTIVATIONS[activation](x_TD @ w1.T) * (x_TD @ w3.T)) @ w2.T)
    return out_TD


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("bits", "product", "hidden", "inner", "groups"),
    [
        (8, torch.bfloat16, 128, 344, (1, 8)),  # xAI's scales: one a row, and eight rows of 43 inputs
        (8, torch.float32, 128, 344, (1, 8)),
        (8, torch.float32, 256, 384, (2, 3)),
        (4, torch.float32, 256, 384, (2, 3)),
        (4, torch.float32, 64, 96, (2, 3)),
        (4, torch.float32, 128, 344, (16, 43)),  # groups of 8
    ],
)
def test_equals_plain_weights(activation, bits, product, hidden, inner, groups) -> None:
    torch.manual_seed(bits + hidden)
    matrices = random_layer(hidden, inner, groups, Format(bits, product))
    experts = loaded(matrices, activation)
    for num_tokens in (1, 2, 3, 17):
        arguments = random_call(num_tokens, hidden)
        reference_TD = expected(matrices, activation, *arguments)
        torch.testing.assert_close(call(experts, *arguments).double(), reference_TD, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("bits", "product", "hidden", "inner", "groups"),
    [
        (8, torch.bfloat16, 128, 344, (1, 8)),
        (8, torch.float32, 256, 384, (2, 3)),  # groups of 128: so many columns are summed as integers
        (8, torch.float32, 768, 96, (1, 1)),  # 256 of 768, and 32
        (8, torch.float32, 128, 344, (1, 8)),  # groups of 43 in w2 only: products of floats there
        (4, torch.float32, 256, 384, (2, 3)),
        (4, torch.float32, 128, 96, (1, 3)),  # groups of 32 in w2: too few
    ],
)
def test_bfloat16_tokens_are_rounded_once(bits, product, hidden, inner, groups) -> None:
    torch.manual_seed(bits + hidden)
    matrices = random_layer(hidden, inner, groups, Format(bits, product))
    experts = loaded(matrices, "silu", torch.bfloat16)
    for num_tokens in (1, 2, 3, 17):
        x_TD, weights_TK, ids_TK = random_call(num_tokens, hidden)
        x_TD = x_TD.bfloat16()
        exact_TD = expected(matrices, "silu", x_TD, weights_TK, ids_TK)
        found_TD = call(experts, x_TD, weights_TK, ids_TK)
        assert found_TD.dtype == torch.bfloat16
        # Half a step of bfloat16, and what 16 bits lose of the largest number.
        torch.testing.assert_close(found_TD.double(), exact_TD, rtol=2**-8, atol=2**-14 * float(exact_TD.abs().max()))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_numbers_have_room(bits) -> None:
    """Every weight and every token at the end of its range, with the same sign."""
    stored, hidden, inner = Format(bits, torch.float32), 256, 256
    low = torch.full((256, 256), -(1 << bits - 1), dtype=torch.int8)
    scales = torch.full((256, 1), 2.0**-10, dtype=torch.bfloat16)
    matrix = Quantised(stored, pack(low, bits), scales)
    matrices = {(expert, name): matrix for expert in range(EXPERTS) for name in ("w1", "w2", "w3")}
    x_TD, weights_TK = torch.full((1, hidden), -1.0, dtype=torch.bfloat16), torch.ones(1, 1)
    ids_TK = torch.zeros((1, 1), dtype=torch.int32)
    found_TD = call(loaded(matrices, "silu", torch.bfloat16), x_TD, weights_TK, ids_TK)
    exact_TD = expected(matrices, "silu", x_TD, weights_TK, ids_TK)
    assert inner == low.shape[1]
    torch.testing.assert_close(found_TD.double(), exact_TD, rtol=2**-8, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bits, wrong) -> None:
    torch.manual_seed(4)
    matrices = random_layer(128, 128, (1, 1), Format(bits, torch.float32))
    x_TD, weights_TK, ids_TK = random_call(3, 128)
    x_TD[1, 5] = wrong
    x_TD[2] = 0
    found_TD = call(loaded(matrices, "silu", torch.bfloat16), x_TD.bfloat16(), weights_TK, ids_TK)
    assert found_TD[0].isfinite().all() and not found_TD[1].isfinite().any() and not found_TD[2].any()


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (Format(8, torch.bfloat16), torch.float32),
        (Format(8, torch.float32), torch.bfloat16),
        (Format(4, torch.float32), torch.bfloat16),
    ],
)
def test_a_token_depends_on_no_other_and_on_no_thread(stored, dtype) -> None:
    torch.manual_seed(2)
    matrices = random_layer(128, 320, (2, 5), stored)
    x_TD, weights_TK, ids_TK = random_call(23, 128)
    x_TD = x_TD.to(dtype)
    together_TD = call(loaded(matrices, "gelu", dtype), x_TD, weights_TK, ids_TK)
    alone = loaded(matrices, "gelu", dtype, num_threads=1)
    rows = [call(alone, x_TD[t : t + 1], weights_TK[t : t + 1], ids_TK[t : t + 1]) for t in range(23)]
    assert torch.equal(together_TD, torch.cat(rows))


def test_experts_elsewhere_add_nothing() -> None:
    torch.manual_seed(3)
    matrices = random_layer(64, 64, (1, 1), Format(4, torch.float32))
    x_TD, weights_TK, ids_TK = random_call(6, 64)
    ids_TK[0] = -1
    ids_TK[3, 1] = -1
    found_TD = call(loaded(matrices, "silu"), x_TD, weights_TK, ids_TK)
    assert not found_TD[0].any()
    reference_TD = expected(matrices, "silu", x_TD, weights_TK, ids_TK)
    torch.testing.assert_close(found_TD.double(), reference_TD, rtol=1e-4, atol=1e-6)


def test_memory_is_what_is_stored() -> None:
    experts = loaded(random_layer(128, 256, (1, 2), Format(4, torch.float32)), "silu")
    assert experts.memory_bytes == EXPERTS * (3 * 128 * 256 // 2 + 2 * 256 * 2 + 128 * 2 * 2)


def test_what_does_not_fit_is_refused() -> None:
    matrices = random_layer(64, 32, (1, 1), Format(8, torch.float32))
    experts = loaded(matrices, "silu")
    for wrong in (
        random_matrix(32, 64, 2, Format(8, torch.float32)),
        random_matrix(32, 64, 1, Format(4, torch.float32)),
    ):
        with pytest.raises(ValueError, match="w1 of expert 1 does not fit"):
            experts.put(1, "w1", wrong)
    with pytest.raises(ValueError, match="w3 of expert 2 is missing"):
        loaded({key: matrix for key, matrix in matrices.items() if key != (2, "w3")}, "silu").ready()
    assert not can_compute("swigluoai", torch.float32)
    assert not can_compute("silu", torch.float16)
