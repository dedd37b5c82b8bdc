"""Adding partial sums: in float32, always in the same order, without entering a thread pool.

torch converts and rounds several times faster than numpy, but hands any operation on more than 32,768 elements to its
thread pool, whose wake-up costs more than the whole sum. So operations here are cut into blocks of at most that many.
T tokens, t rows of one part, D hidden size.
"""

from __future__ import annotations

import numpy as np
import torch

Rows = slice | np.ndarray
_SERIAL_ELEMENTS = 32768  # at::internal::GRAIN_SIZE; parallel_for goes parallel above it (ATen/Parallel-inl.h)


class Accumulator:
    """A reusable float32 sum of [T, D]. begin(), add() any number of times, finish()."""

    def __init__(self, hidden: int, max_tokens: int) -> None:
        self._hidden = hidden
        self._block_rows = max(1, _SERIAL_ELEMENTS // hidden)
        self._wide_tD = torch.empty((self._block_rows, hidden), dtype=torch.float32)
        self._scratch_tD = np.empty((self._block_rows, hidden), np.float32)
        self._wide_views: dict[int, tuple[torch.Tensor, np.ndarray]] = {}
        self._sum_views: dict[int, tuple[torch.Tensor, np.ndarray]] = {}
        self._allocate(max_tokens)
        self.begin(max_tokens)

    def _allocate(self, num_tokens: int) -> None:
        self._all_TD = torch.empty((num_tokens, self._hidden), dtype=torch.float32)
        self._sum_views.clear()

    def begin(self, num_tokens: int) -> None:
        """Forget the last sum; the new one has `num_tokens` rows of zero."""
        if num_tokens > len(self._all_TD):
            self._allocate(num_tokens)
        self._tensor_TD, self._array_TD = _view(self._sum_views, self._all_TD, num_tokens)
        self._num_tokens = num_tokens
        self._is_zero = True  # whatever the memory says

    def add(self, partial_tD: torch.Tensor, rows: Rows) -> None:
        """Add a partial sum to these rows, each named once."""
        num_rows = len(partial_tD)
        if self._is_zero:
            self._is_zero = False
            if isinstance(rows, slice) and num_rows == self._num_tokens:
                self._copy(self._tensor_TD, partial_tD, num_rows)
                return
            self._array_TD.fill(0)
        target_TD = self._array_TD[rows] if isinstance(rows, slice) else self._array_TD
        for first in range(0, num_rows, self._block_rows):
            end = min(first + self._block_rows, num_rows)
            whole = end - first == num_rows
            wide_tD = self._widen(partial_tD if whole else partial_tD[first:end], end - first)
            if isinstance(rows, slice):
                part_tD = target_TD[first:end]
                np.add(part_tD, wide_tD, out=part_tD)
            else:  # not torch's index_add_, which enters the thread pool at any size
                self._add_rows(wide_tD, rows if whole else rows[first:end])

    def _widen(self, partial_tD: torch.Tensor, num_rows: int) -> np.ndarray:
        if partial_tD.dtype is torch.float32:
            return partial_tD.numpy()
        wide_tD, array_tD = _view(self._wide_views, self._wide_tD, num_rows)
        wide_tD.copy_(partial_tD)
        return array_tD

    def _add_rows(self, wide_tD: np.ndarray, rows: np.ndarray) -> None:
        scratch_tD = self._scratch_tD[: len(rows)]
        self._array_TD.take(rows, axis=0, out=scratch_tD, mode="clip")  # "raise" would copy once more
        np.add(scratch_tD, wide_tD, out=scratch_tD)
        self._array_TD[rows] = scratch_tD

    def finish(self, out_TD: torch.Tensor) -> None:
        """Write the sum, rounded to the dtype of `out_TD`."""
        if self._is_zero:
            self._array_TD.fill(0)
        self._copy(out_TD, self._tensor_TD, self._num_tokens)

    def _copy(self, target_TD: torch.Tensor, source_TD: torch.Tensor, num_rows: int) -> None:
        step = self._block_rows
        if num_rows <= step:
            target_TD.copy_(source_TD)
            return
        for first in range(0, num_rows, step):
            target_TD[first : first + step].copy_(source_TD[first : first + step])


def _view(
    views: dict[int, tuple[torch.Tensor, np.ndarray]], memory: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, np.ndarray]:
    """The first rows of `memory` for torch and for numpy, remembered in `views`."""
    view = views.get(num_rows)
    if view is None:
        if len(views) >= 256:
            views.clear()
        view = views[num_rows] = (memory[:num_rows], memory[:num_rows].numpy())
    return view
