"""The attention temperature: which rows need it, and exact attention for them."""

import math

import pytest
import torch

from model import grok_temperature
from model.grok_temperature import RowRun, attend_rows, group_by_position, split_batch, temperature


def test_temperature_starts_beyond_the_length() -> None:
    assert temperature(0, 16) == temperature(16, 16) == 1.0
    assert temperature(256, 16) == 2.0


def test_split_batch() -> None:
    # A prompt below, one that crosses, one beyond, a decoding row at the length and one just beyond; length 16.
    starts, seq_lens = [0, 5, 15, 20, 21, 22], [5, 20, 40, 17, 18]
    split = split_batch(starts, seq_lens, 16)
    assert split.below == (RowRun(0, 0, 5, 0), RowRun(1, 5, 7, 10), RowRun(3, 20, 1, 16))
    assert split.beyond == (RowRun(1, 12, 3, 17), RowRun(2, 15, 5, 35), RowRun(4, 21, 1, 17))
    rows = [run.first_row + i for run in split.below + split.beyond for i in range(run.num_rows)]
    assert sorted(rows) == list(range(22))


def test_split_batch_without_rows() -> None:
    assert split_batch([0, 0, 2], [9, 2], 4).beyond == ()


def test_group_by_position() -> None:
    groups = group_by_position([RowRun(0, 3, 2, 20), RowRun(4, 9, 1, 21)])
    assert groups == {20: [(0, 3)], 21: [(0, 4), (4, 9)]}


def naive(q_RHD: torch.Tensor, first: int, k_GSD: torch.Tensor, v_GSD: torch.Tensor, cap: float) -> torch.Tensor:
    num_heads = q_RHD.shape[1]
    out = torch.empty_like(q_RHD, dtype=torch.float64)
    for row, q_HD in enumerate(q_RHD.double()):
        position = first + row
        for head, q_D in enumerate(q_HD):
            group = head // (num_heads // len(k_GSD))
            scores = k_GSD[group, : position + 1].double() @ q_D * 0.4
            scores = cap * torch.tanh(scores / cap) if cap else scores
            weights = (scores * temperature(position, 10)).softmax(-1)
            out[row, head] = weights @ v_GSD[group, : position + 1].double()
    return out


@pytest.mark.parametrize("cap", [0.0, 2.5])
@pytest.mark.parametrize("first", [0, 8, 30])
@pytest.mark.parametrize(("max_scores", "keys_per_step"), [(10**9, 10**9), (100, 7), (1, 1)])
def test_attend_rows(
    monkeypatch: pytest.MonkeyPatch, cap: float, first: int, max_scores: int, keys_per_step: int
) -> None:
    monkeypatch.setattr(grok_temperature, "MAX_SCORES", max_scores)
    monkeypatch.setattr(grok_temperature, "KEYS_PER_STEP", keys_per_step)
    generator = torch.Generator().manual_seed(first)
    q_RHD = torch.randn(9, 6, 8, generator=generator)
    k_GSD, v_GSD = torch.randn(2, 2, first + 9, 8, generator=generator)
    loads = []

    def load(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        loads.append(end - start)
        return k_GSD[:, start:end], v_GSD[:, start:end]

    out_RHD = torch.empty_like(q_RHD)
    attend_rows(q_RHD, first, load, scale=0.4, cap=cap, length=10, out_RHD=out_RHD)
    assert max(loads) <= keys_per_step
    assert torch.allclose(out_RHD.double(), naive(q_RHD, first, k_GSD, v_GSD, cap), atol=1e-5)


def test_scaled_stock_score_is_the_temperature() -> None:
    """c'*tanh(a'*x/c') with a' = t*a and c' = t*c is t*c*tanh(a*x/c)."""
    a, c, t = 0.3, 30.0, 1.7
    for x in (-200.0, -1.0, 0.0, 3.0, 90.0):
        assert math.isclose(t * c * math.tanh(t * a * x / (t * c)), t * (c * math.tanh(a * x / c)), rel_tol=1e-12)
