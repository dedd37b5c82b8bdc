"""Grok-2's attention temperature, without vLLM: which rows of a batch need it, and exact attention for such rows.

Beyond attn_temperature_len a score is t(pos) * c*tanh(a*q.k/c) with t(pos) = log2(pos)/log2(len), pos the 0-based
position of the query (SGLang kernels/ops/attention/extend_attention.py, xai_temperature_len): t multiplies after the
cap. A stock kernel computes c'*tanh(a'*q.k/c') with one a' and c' per call. With a' = t*a and c' = t*c that is the same
score, so queries of equal position can share a stock call; a run of positions (a prefill chunk) goes to attend_rows.

Shape letters: T rows of the batch, R rows of one run, H query heads, G key-value heads, Q = H/G, S keys, D head_dim.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Scores held at once by attend_rows: 16 Mi float32 = 64 MiB, whatever the context length.
MAX_SCORES = 16 * 1024 * 1024
KEYS_PER_STEP = 2048

# (first key, end key) -> keys_GSD, values_GSD of one sequence.
LoadKeys = Callable[[int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RowRun:
    """Rows first_row .. first_row+num_rows of the batch: request `request`, positions first_position onward."""

    request: int
    first_row: int
    num_rows: int
    first_position: int


@dataclass(frozen=True)
class Split:
    """A batch cut at the temperature length: runs whose temperature is 1, and runs beyond it."""

    below: tuple[RowRun, ...]
    beyond: tuple[RowRun, ...]


def temperature(position: int, length: int) -> float:
    """t(pos): 1 up to and including `length`, log2(pos)/log2(length) beyond."""
    return math.log2(position) / math.log2(length) if position > length else 1.0


def split_batch(query_starts: Sequence[int], seq_lens: Sequence[int], length: int) -> Split:
    """Cut every request's rows at the first position beyond `length`.

    query_starts: first row of each request and the end of the last one; seq_lens: keys of each request, its own rows
    included, so a request's rows have the positions seq_len - num_rows .. seq_len - 1.
    """
    below, beyond = [], []
    for request, seq_len in enumerate(seq_lens):
        first_row, end_row = query_starts[request], query_starts[request + 1]
        position = seq_len - (end_row - first_row)
        num_below = min(max(length + 1 - position, 0), end_row - first_row)
        if num_below:
            below.append(RowRun(request, first_row, num_below, position))
        if first_row + num_below < end_row:
            num_beyond = end_row - first_row - num_below
            beyond.append(RowRun(request, first_row + num_below, num_beyond, position + num_below))
    return Split(tuple(below), tuple(beyond))


def group_by_position(runs: Sequence[RowRun]) -> dict[int, list[tuple[int, int]]]:
    """position -> [(request, row)] over all rows of the runs."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for run in runs:
        for offset in range(run.num_rows):
            groups.setdefault(run.first_position + offset, []).append((run.request, run.first_row + offset))
    return groups


def attend_rows(
    q_RHD: Tensor, first_position: int, load: LoadKeys, *, scale: float, cap: float, length: int, out_RHD: Tensor
) -> None:
    """Causal attention of consecutive positions of one sequence, in float32, written into out_RHD (any float dtype).

    cap 0 means no cap. The keys come in steps, with a running softmax, so the memory is bounded by MAX_SCORES.
    """
    num_rows, num_heads, _ = q_RHD.shape
    rows_per_step = max(1, MAX_SCORES // (num_heads * KEYS_PER_STEP))
    for start in range(0, num_rows, rows_per_step):
        end = min(num_rows, start + rows_per_step)
        out_RHD[start:end] = _attend_step(
            q_RHD[start:end].float(), first_position + start, load, scale=scale, cap=cap, length=length
        )


def _attend_step(
    q_RHD: Tensor, first_position: int, load: LoadKeys, *, scale: float, cap: float, length: int
) -> Tensor:
    num_rows, num_heads, head_dim = q_RHD.shape
    end_key = first_position + num_rows
    positions_R = torch.arange(first_position, end_key, device=q_RHD.device)
    t_R1 = _temperatures(positions_R, length)[:, None]
    # best: the largest score so far; total and out: sums of exp(score - best) and of its products with the values.
    best_HR = torch.full((num_heads, num_rows), -math.inf, device=q_RHD.device)
    total_HR = torch.zeros_like(best_HR)
    out_HRD = torch.zeros(num_heads, num_rows, head_dim, device=q_RHD.device)
    for first_key in range(0, end_key, KEYS_PER_STEP):
        last_key = min(end_key, first_key + KEYS_PER_STEP)
        keys_GSD, values_GSD = load(first_key, last_key)
        num_kv_heads = keys_GSD.shape[0]
        # Query heads h*Q .. h*Q+Q-1 share key-value head h.
        q_GXD = q_RHD.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
        scores_HRS = (q_GXD @ keys_GSD.float().transpose(1, 2)).view(num_heads, num_rows, -1)
        scores_HRS.mul_(scale)
        if cap:
            scores_HRS.div_(cap).tanh_().mul_(cap)
        scores_HRS.mul_(t_R1)
        if last_key > first_position + 1:
            keys_S = torch.arange(first_key, last_key, device=q_RHD.device)
            scores_HRS.masked_fill_(keys_S > positions_R[:, None], -math.inf)
        # The first step holds key 0, which every row sees, so from then on no maximum is -inf.
        new_best_HR = torch.maximum(best_HR, scores_HRS.amax(dim=-1))
        shrink_HR = (best_HR - new_best_HR).exp_()
        weights_HRS = scores_HRS.sub_(new_best_HR[..., None]).exp_()
        step_HRD = weights_HRS.view(num_kv_heads, -1, last_key - first_key) @ values_GSD.float()
        total_HR = total_HR * shrink_HR + weights_HRS.sum(dim=-1)
        out_HRD = out_HRD * shrink_HR[..., None] + step_HRD.view_as(out_HRD)
        best_HR = new_best_HR
    return (out_HRD / total_HR[..., None]).transpose(0, 1)


def _temperatures(positions_R: Tensor, length: int) -> Tensor:
    scaled_R = positions_R.double().log2() / math.log2(length)
    return torch.where(positions_R > length, scaled_R, torch.ones_like(scaled_R)).float()
