"""The attention backend of Grok-2's layers: a stock backend plus the attention temperature (model/grok_temperature.py).

with_temperature(backend) subclasses whatever backend vLLM chose. Batches whose sequences all end below the length go
through the stock code untouched; that is decided from CPU-side lengths, once per step. In the others:
- rows below the length: one stock call over a batch made of those rows alone;
- short runs beyond it (decoding): stock calls with scale t*a and cap t*c, one for each distinct position;
- long runs beyond it (prefill chunks): float32 torch over the paged cache.
Checked on CPU only. On CUDA the same code runs over the backends whose cache is (block, head, slot, K|V); it is the
correct fallback, not a fast path, and it is kept out of full CUDA graphs and of cascade attention.

Shape letters as in grok_temperature, and B blocks, N slots of a block.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.selector import get_attn_backend

from model.grok_temperature import LoadKeys, RowRun, attend_rows, group_by_position, split_batch, temperature

# Runs of at most this many rows take stock calls; a longer one costs fewer passes over the keys in attend_rows.
MAX_STOCK_RUN_ROWS = 4
# Backends whose impl takes scale and cap from itself at each call. The GPU ones keep (block, kv head, slot, K|V);
# CPU_ATTN packs a block in its own order, see _block_layout.
SUPPORTED_BACKENDS = ("CPU_ATTN", "TRITON_ATTN", "FLASH_ATTN")


@dataclass
class StockCall:
    """One call of the stock kernel: batch rows rows_R as a batch of their own, at temperature t."""

    rows_R: Tensor  # noqa: N815
    metadata: Any
    t: float


@dataclass
class TemperaturePlan:
    """How one step's batch is computed; in metadata.temperature_plan, None where every temperature is 1."""

    stock: list[StockCall]
    long_runs: list[RowRun]
    block_table: Tensor


def temperature_backend(head_dim: int, dtype: torch.dtype, cache_config: Any) -> type[AttentionBackend]:
    """The backend vLLM would choose for a layer of these sizes, with the temperature added.

    Raises ValueError if that backend cannot be extended; TRITON_ATTN always can.
    """
    base = get_attn_backend(head_dim, dtype, cache_config.cache_dtype if cache_config else "auto")
    if base.get_name() not in SUPPORTED_BACKENDS:
        raise ValueError(
            f"attn_temperature_len needs one of the attention backends {', '.join(SUPPORTED_BACKENDS)}, "
            f"vLLM chose {base.get_name()}; start it with --attention-backend TRITON_ATTN"
        )
    return with_temperature(base)


@functools.cache
def with_temperature(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend like `base` whose layers take `temperature_len` (tokens) as an extra argument.

    It keeps the name of `base`, which vLLM looks up in its own list of backends.
    """
    impl = type("TemperatureImpl", (_TemperatureImpl, base.get_impl_cls()), {})
    builder = type("TemperatureBuilder", (_TemperatureBuilder, base.get_builder_cls()), {})
    methods = {"get_impl_cls": staticmethod(lambda: impl), "get_builder_cls": staticmethod(lambda: builder)}
    return type(f"Temperature{base.__name__}", (base,), methods)


class _TemperatureBuilder:
    """Mixin before a stock AttentionMetadataBuilder."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        if device.type != "cpu" and vllm_config.speculative_config is not None:
            # vLLM then knows only upper bounds of the lengths on the CPU side, and t needs the position itself.
            raise NotImplementedError("attn_temperature_len with speculative decoding needs the CPU backend")
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        lengths = {layer.impl.temperature_len for layer in layers.values()}
        if len(lengths) != 1:
            raise ValueError(f"layers of one KV cache group disagree about attn_temperature_len: {sorted(lengths)}")
        (self._temperature_len,) = lengths
        self._has_layout = all(layer.impl.has_known_layout() for layer in layers.values())

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any):
        metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)  # type: ignore[misc]
        metadata.temperature_plan = None
        # The last position of the longest sequence is max_seq_len - 1.
        if common_attn_metadata.max_seq_len - 1 > self._temperature_len:
            metadata.temperature_plan = self._plan(common_attn_metadata)
        return metadata

    def _plan(self, common: CommonAttentionMetadata) -> TemperaturePlan | None:
        seq_lens = common.seq_lens if common.seq_lens.device.type == "cpu" else common.seq_lens_cpu_upper_bound
        num_reqs = common.num_reqs
        split = split_batch(
            common.query_start_loc_cpu[: num_reqs + 1].tolist(), seq_lens[:num_reqs].tolist(), self._temperature_len
        )
        if not split.beyond:
            return None
        short = [run for run in split.beyond if run.num_rows <= MAX_STOCK_RUN_ROWS or not self._has_layout]
        long_runs = [run for run in split.beyond if run.num_rows > MAX_STOCK_RUN_ROWS and self._has_layout]
        stock = [self._stock_call(common, split.below, 1.0)] if split.below else []
        for position, rows in group_by_position(short).items():
            runs = [RowRun(request, row, 1, position) for request, row in rows]
            stock.append(self._stock_call(common, runs, temperature(position, self._temperature_len)))
        return TemperaturePlan(stock, long_runs, common.block_table_tensor)

    def _stock_call(self, common: CommonAttentionMetadata, runs: Any, t: float) -> StockCall:
        """The runs as a batch: each is the last rows of a sequence that ends where the run ends."""
        device = common.seq_lens.device
        counts = torch.tensor([run.num_rows for run in runs], dtype=torch.int32)
        starts_cpu = torch.zeros(len(runs) + 1, dtype=torch.int32)
        starts_cpu[1:] = counts.cumsum(0)
        ends_cpu = torch.tensor([run.first_position + run.num_rows for run in runs], dtype=common.seq_lens.dtype)
        rows_R = torch.cat([torch.arange(run.first_row, run.first_row + run.num_rows) for run in runs]).to(device)
        requests = torch.tensor([run.request for run in runs], device=device)
        part = common.replace(
            query_start_loc=starts_cpu.to(device=device, dtype=common.query_start_loc.dtype),
            query_start_loc_cpu=starts_cpu,
            seq_lens=ends_cpu.to(device),
            seq_lens_cpu_upper_bound=ends_cpu,
            num_reqs=len(runs),
            num_actual_tokens=len(rows_R),
            max_query_len=int(counts.max()),
            max_seq_len=int(ends_cpu.max()),
            block_table_tensor=common.block_table_tensor[requests],
            slot_mapping=common.slot_mapping[rows_R],
            positions=None,
            is_prefilling=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return StockCall(rows_R, super().build(0, part), t)  # type: ignore[misc]


class _TemperatureImpl:
    """Mixin before a stock AttentionImpl, whose attributes it uses."""

    scale: float
    logits_soft_cap: float
    head_size: int
    kv_cache_dtype: str

    def __init__(self, *args: Any, temperature_len: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.temperature_len = temperature_len

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        plan = getattr(attn_metadata, "temperature_plan", None)
        if plan is None:
            stock = super().forward  # type: ignore[misc]
            return stock(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if any(argument is not None for argument in (*args, *kwargs.values())):
            raise NotImplementedError("fused output quantization with attn_temperature_len")
        out_THD = output.view(query.shape)
        for call in plan.stock:
            scaled = copy.copy(self)
            scaled.scale = self.scale * call.t
            scaled.logits_soft_cap = self.logits_soft_cap * call.t
            part_RHD = torch.empty_like(query[: len(call.rows_R)])
            q_RHD, k_RGD, v_RGD = query[call.rows_R], key[call.rows_R], value[call.rows_R]
            stock = super(_TemperatureImpl, scaled).forward  # type: ignore[misc]
            stock(layer, q_RHD, k_RGD, v_RGD, kv_cache, call.metadata, part_RHD)
            out_THD[call.rows_R] = part_RHD
        for run in plan.long_runs:
            rows = slice(run.first_row, run.first_row + run.num_rows)
            attend_rows(
                query[rows],
                run.first_position,
                self._loader(layer, kv_cache, plan.block_table[run.request]),
                scale=self.scale,
                cap=float(self.logits_soft_cap or 0),
                length=self.temperature_len,
                out_RHD=out_THD[rows],
            )
        return output

    def has_known_layout(self) -> bool:
        """Whether _loader can read this backend's cache; without it every row takes a stock call."""
        return not is_quantized_kv_cache(self.kv_cache_dtype)

    def _loader(self, layer: Any, kv_cache: Tensor, blocks_B: Tensor) -> LoadKeys:
        block_size, head_dim = kv_cache.shape[2], self.head_size
        on_cpu = kv_cache.device.type == "cpu"
        if on_cpu:
            key_order, value_order = _block_layout(layer.isa, kv_cache.dtype, block_size, head_dim)

        def load(first_key: int, end_key: int) -> tuple[Tensor, Tensor]:
            first_block = first_key // block_size
            picked_B = blocks_B[first_block : (end_key - 1) // block_size + 1].long()
            cache_BGNC = kv_cache[picked_B]
            num_blocks, num_kv_heads = cache_BGNC.shape[:2]
            if on_cpu:
                halves_BG2X = cache_BGNC.reshape(num_blocks, num_kv_heads, 2, block_size * head_dim)
                keys = halves_BG2X[:, :, 0].index_select(-1, key_order)
                values = halves_BG2X[:, :, 1].index_select(-1, value_order)
            else:
                keys, values = cache_BGNC.split(head_dim, dim=-1)
            skip = first_key - first_block * block_size

            def flat(blocks: Tensor) -> Tensor:
                x_BGND = blocks.reshape(num_blocks, num_kv_heads, block_size, head_dim)
                x_GSD = x_BGND.transpose(0, 1).reshape(num_kv_heads, num_blocks * block_size, head_dim)
                return x_GSD[:, skip : skip + end_key - first_key]

            return flat(keys), flat(values)

        return load


@functools.cache
def _block_layout(isa: str, dtype: torch.dtype, block_size: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Where vLLM's CPU kernels put element (slot, dim) of a block, for keys and for values: two index tensors [N*D].

    The packing differs by instruction set and is nobody's interface, so it is observed: numbered elements are written
    through vLLM's own op and read back, in digits small enough for bfloat16. Raises RuntimeError if a block turns out
    not to be a permutation of its elements.
    """
    num_elements, base = block_size * head_dim, 128
    logical = torch.arange(num_elements)
    found = torch.zeros(2, num_elements, dtype=torch.long)
    weight = 1
    while weight <= num_elements:
        digit_N1D = (logical // weight % base).view(block_size, 1, head_dim).to(dtype)
        cache = torch.zeros(1, 1, block_size * 2, head_dim, dtype=dtype)
        keys, values = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(digit_N1D, digit_N1D, keys, values, torch.arange(block_size), isa)
        found += cache.view(2, num_elements).long() * weight
        weight *= base
    orders = found.argsort(dim=-1)
    if not all(torch.equal(side[order], logical) for side, order in zip(found, orders, strict=True)):
        raise RuntimeError(f"the CPU attention cache ({isa}, {dtype}) does not keep a block's elements within it")
    return orders[0], orders[1]
