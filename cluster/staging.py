"""Looking at tensors from numpy, and bringing tensors of other devices into host memory and back.

T tokens, D hidden size, K top_k.
"""

from __future__ import annotations

import numpy as np
import torch

from cluster.wire import Agreement


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor's memory as a numpy array, without a copy; bfloat16 appears as uint16."""
    tensor = tensor.detach()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype is torch.bfloat16 else tensor.numpy()


class Staging:
    """Pinned buffers between one device and the host. Used by one thread; copies run on the device's current stream."""

    def __init__(self, shape: Agreement, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._rows = 0
        self._used: torch.cuda.Event | None = None
        self._grow(shape.max_tokens)

    def _grow(self, num_tokens: int) -> None:
        self._rows = num_tokens
        hidden, top_k, pin = self._shape.hidden, self._shape.top_k, self._device.type == "cuda"
        self._x_TD = torch.empty((num_tokens, hidden), dtype=self._shape.dtype, pin_memory=pin)
        self._out_TD = torch.empty((num_tokens, hidden), dtype=self._shape.dtype, pin_memory=pin)
        self._weights_TK = torch.empty((num_tokens, top_k), dtype=torch.float32, pin_memory=pin)
        self._ids_TK = torch.empty((num_tokens, top_k), dtype=torch.int32, pin_memory=pin)

    def input(
        self, x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Host copies of a call's inputs, complete when this returns; valid until the next input()."""
        n = len(x_TD)
        if n > self._rows:
            self._wait_for_output()
            self._grow(n)
        staged = (self._x_TD[:n], self._weights_TK[:n], self._ids_TK[:n])
        for target, source in zip(staged, (x_TD, weights_TK, ids_TK), strict=True):
            target.copy_(source, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return staged

    def output(self, num_tokens: int) -> torch.Tensor:
        """Host memory to combine into, once the last output has left it."""
        self._wait_for_output()
        return self._out_TD[:num_tokens]

    def output_used(self) -> None:
        """A copy out of output() was queued on the current stream."""
        if self._device.type == "cuda":
            self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._used.record(torch.cuda.current_stream(self._device))

    def _wait_for_output(self) -> None:
        if self._used is not None:
            self._used.synchronize()
            self._used = None
