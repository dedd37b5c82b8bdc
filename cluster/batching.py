"""One kernel call for one or many waiting calls of a layer."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

import numpy as np
import torch

from cluster.session import Request
from cluster.wire import Agreement, numpy_dtype

ComputeFn = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool], None]
"""(layer, x_TD, topk_weights_TK f32, local_ids_TK i32 with -1 = not here, out_TD, complete = no id is -1): writes
partial sums into out_TD."""


class Batcher:
    """Runs `compute` on a single call in place, or on several after copying them next to each other."""

    def __init__(self, compute: ComputeFn, shape: Agreement, layers: range, num_local_experts: int) -> None:
        self._compute = compute
        self._shape = shape
        self._layers = layers
        self._num_local_experts = num_local_experts
        self.expert_tokens = np.zeros((len(layers), num_local_experts), np.int64)
        raw = numpy_dtype(shape.dtype)
        self._x_TD = np.empty((shape.max_tokens, shape.hidden), raw)
        self._out_TD = np.empty((shape.max_tokens, shape.hidden), raw)
        self._weights_TK = np.empty((shape.max_tokens, shape.top_k), np.float32)
        self._ids_TK = np.empty((shape.max_tokens, shape.top_k), np.int32)

    def run(self, layer: int, batch: list[Request], num_tokens: int) -> tuple[int, str]:
        """Compute a batch into its reply slots. Returns (kernel nanoseconds, "" or what the kernel raised)."""
        begin_ns = time.monotonic_ns()
        try:
            if len(batch) == 1:
                request = batch[0]
                x_TD, weights_TK, out_TD = request.memory.tensors(num_tokens)
                begin_ns = time.monotonic_ns()
                self._compute(layer, x_TD, weights_TK, request.ids_tensor(), out_TD, request.complete)
                return time.monotonic_ns() - begin_ns, ""
            return self._run_many(layer, batch, num_tokens), ""
        except Exception as e:  # foreign code: whatever it raises is this batch's answer, and the server lives on
            traceback.print_exc()
            return time.monotonic_ns() - begin_ns, f"{type(e).__name__}: {e}"

    def _run_many(self, layer: int, batch: list[Request], num_tokens: int) -> int:
        start = 0
        for request in batch:
            end = start + request.num_tokens
            x_TD, weights_TK, _, _ = request.memory.arrays(request.num_tokens)
            self._x_TD[start:end] = x_TD
            self._weights_TK[start:end] = weights_TK
            self._ids_TK[start:end] = request.ids_TK[: request.num_tokens]
            start = end
        begin_ns = time.monotonic_ns()
        self._compute(
            layer,
            self._tensor(self._x_TD[:num_tokens]),
            torch.from_numpy(self._weights_TK[:num_tokens]),
            torch.from_numpy(self._ids_TK[:num_tokens]),
            self._tensor(self._out_TD[:num_tokens]),
            all(request.complete for request in batch),
        )
        compute_ns = time.monotonic_ns() - begin_ns
        start = 0
        for request in batch:
            end = start + request.num_tokens
            request.memory.arrays(request.num_tokens)[3][...] = self._out_TD[start:end]
            start = end
        return compute_ns

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        if self._shape.dtype == torch.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def count(self, layer: int, batch: list[Request]) -> None:
        """Add a computed batch to the number of tokens that each local expert has seen."""
        row = self.expert_tokens[layer - self._layers.start]
        for request in batch:
            ids = request.ids_TK[: request.num_tokens].ravel()
            row += np.bincount(ids + 1, minlength=self._num_local_experts + 1)[1:]
