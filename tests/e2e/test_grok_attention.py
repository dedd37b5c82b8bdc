"""The temperature backend over vLLM's CPU kernels and paged cache, without an engine: every path, exact and taken."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from model import grok_attention
from model.grok_attention import with_temperature
from model.grok_temperature import temperature

LENGTH, SCALE, CAP, BLOCK_SIZE = 40, 0.4, 3.0, 32
NUM_HEADS, NUM_KV_HEADS = 6, 2
# (tokens in the cache before, new tokens): a prompt below, chunks that cross and lie beyond, rows that decode at the
# length, just beyond it and far beyond it, two of them at one position.
MIXED = [(0, 20), (30, 25), (90, 33), (40, 1), (41, 1), (41, 1), (200, 1), (60, 3)]
BELOW = [(0, 41), (20, 21), (40, 1)]

torch.cpu._init_amx()
Backend = with_temperature(CPUAttentionBackend)


def make_builder(dtype: torch.dtype, head_dim: int) -> Any:
    """A metadata builder as vLLM would make it for one layer, without a vLLM configuration."""
    builder = object.__new__(Backend.get_builder_cls())
    builder.num_heads, builder.num_kv_heads, builder.head_dim = NUM_HEADS, NUM_KV_HEADS, head_dim
    builder.dtype, builder.block_size, builder.window_size, builder.kv_cache_dtype = dtype, BLOCK_SIZE, -1, "auto"
    builder.isa = _get_attn_isa(dtype, BLOCK_SIZE, head_dim, "auto")
    builder.is_cross_attention = builder.is_encoder_only_attention = False
    builder._temperature_len, builder._has_layout = LENGTH, True
    return builder


def make_impl(head_dim: int) -> Any:
    impl = object.__new__(Backend.get_impl_cls())
    impl.scale, impl.logits_soft_cap, impl.head_size, impl.temperature_len = SCALE, CAP, head_dim, LENGTH
    impl.alibi_slopes = impl.sinks = None
    impl.sliding_window, impl.kv_cache_dtype, impl.attn_type = -1, "auto", "decoder"
    return impl


class Batch:
    """Random sequences, their keys and values written to a paged cache whose blocks are shuffled."""

    def __init__(self, sequences: list[tuple[int, int]], dtype: torch.dtype, head_dim: int, isa: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sequences = sequences
        lengths = [past + new for past, new in sequences]
        blocks_of = [math.ceil(length / BLOCK_SIZE) for length in lengths]
        free = torch.randperm(sum(blocks_of), generator=generator).tolist()
        table = torch.zeros(len(sequences), max(blocks_of), dtype=torch.int32)
        self.cache = torch.zeros(sum(blocks_of), NUM_KV_HEADS, BLOCK_SIZE, 2 * head_dim, dtype=dtype)
        key_cache, value_cache = self.cache.view(len(self.cache), NUM_KV_HEADS, 2 * BLOCK_SIZE, -1).chunk(2, dim=2)
        self.kv: list[tuple[Tensor, Tensor]] = []
        for request, length in enumerate(lengths):
            mine = [free.pop() for _ in range(blocks_of[request])]
            table[request, : len(mine)] = torch.tensor(mine)
            k, v = torch.randn(2, length, NUM_KV_HEADS, head_dim, generator=generator).to(dtype)
            slots = torch.tensor([mine[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(length)])
            ops.cpu_attn_reshape_and_cache(k, v, key_cache, value_cache, slots, isa)
            self.kv.append((k, v))
        num_rows = sum(new for _, new in sequences)
        self.query = torch.randn(num_rows, NUM_HEADS, head_dim, generator=generator).to(dtype)
        self.new_kv = torch.zeros(2, num_rows, NUM_KV_HEADS, head_dim, dtype=dtype)
        starts = torch.tensor([0, *(new for _, new in sequences)], dtype=torch.int32).cumsum(0).int()
        self.common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            num_reqs=len(sequences),
            num_actual_tokens=num_rows,
            max_query_len=max(new for _, new in sequences),
            max_seq_len=max(lengths),
            block_table_tensor=table,
            slot_mapping=torch.zeros(num_rows, dtype=torch.int64),
        )

    def expected(self) -> Tensor:
        out, row = torch.empty(self.query.shape, dtype=torch.float64), 0
        for (past, new), (k, v) in zip(self.sequences, self.kv, strict=True):
            for position in range(past, past + new):
                for head in range(NUM_HEADS):
                    group = head // (NUM_HEADS // NUM_KV_HEADS)
                    scores = k[: position + 1, group].double() @ self.query[row, head].double() * SCALE
                    scores = CAP * torch.tanh(scores / CAP) * temperature(position, LENGTH)
                    out[row, head] = scores.softmax(-1) @ v[: position + 1, group].double()
                row += 1
        return out


def run(batch: Batch, builder: Any, head_dim: int) -> tuple[Tensor, Any]:
    metadata = builder.build(0, batch.common)
    layer = SimpleNamespace(isa=builder.isa, _k_scale_float=1.0, _v_scale_float=1.0)
    output = torch.full((len(batch.query), NUM_HEADS, head_dim), math.nan, dtype=batch.query.dtype)
    make_impl(head_dim).forward(layer, batch.query, *batch.new_kv, batch.cache, metadata, output)
    return output, metadata.temperature_plan


@pytest.mark.parametrize("max_stock_rows", [0, 4, 10**6], ids=["own path", "both", "stock calls"])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "tolerance"),
    [(torch.float32, 32, 2e-5), (torch.float32, 80, 2e-5), (torch.float32, 128, 2e-5), (torch.bfloat16, 64, 2e-2)],
)
def test_mixed_batch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, tolerance: float, max_stock_rows: int
) -> None:
    monkeypatch.setattr(grok_attention, "MAX_STOCK_RUN_ROWS", max_stock_rows)
    builder = make_builder(dtype, head_dim)
    batch = Batch(MIXED, dtype, head_dim, builder.isa)
    output, plan = run(batch, builder, head_dim)
    assert (output.double() - batch.expected()).abs().max() < tolerance
    below, *scaled = plan.stock
    assert below.t == 1.0
    assert len(below.rows_R) == 20 + 11 + 1
    if max_stock_rows == 4:
        assert [len(call.rows_R) for call in scaled] == [2, 1, 1, 1, 1]  # positions 41 (twice), 200, 60, 61, 62
        assert [run.num_rows for run in plan.long_runs] == [14, 33]
    else:
        assert bool(plan.long_runs) == (max_stock_rows == 0)


def test_without_known_layout_every_row_takes_a_stock_call() -> None:
    builder = make_builder(torch.float32, 32)
    builder._has_layout = False
    batch = Batch(MIXED, torch.float32, 32, builder.isa)
    output, plan = run(batch, builder, 32)
    assert not plan.long_runs
    assert (output.double() - batch.expected()).abs().max() < 2e-5


def test_below_the_length_nothing_is_paid() -> None:
    builder = make_builder(torch.float32, 32)
    batch = Batch(BELOW, torch.float32, 32, builder.isa)
    output, plan = run(batch, builder, 32)
    assert plan is None
    assert (output.double() - batch.expected()).abs().max() < 2e-5


def test_upper_bound_of_the_length_is_not_trusted() -> None:
    """max_seq_len may be larger than any sequence: then the exact lengths decide."""
    builder = make_builder(torch.float32, 32)
    batch = Batch(BELOW, torch.float32, 32, builder.isa)
    batch.common.max_seq_len = 500
    assert builder.build(0, batch.common).temperature_plan is None
