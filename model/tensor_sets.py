"""Tensors by name from safetensors files, whole and plain, however they are stored: cut for TP, or as integers."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError
from model.quantised import PACKED, SCALES, SHAPE, Quantised, format_of, plain
from model.tp_shards import assembled_shape, cut_dimension, shard_sets


class TensorSet:
    """Open files that hold parts of the same tensors (see shard_sets), usually one; reads only what is asked for."""

    def __init__(self, files: tuple[Path, ...], opened: list[Any]):
        self._files = files
        self._opened = opened
        self.format = format_of(opened[0].metadata(), str(files[0]))
        stored = opened[0].offset_keys()
        for path, other in zip(files, opened, strict=True):
            odd = set(stored) ^ set(other.keys())
            if odd:
                raise CheckpointError(
                    f"{path} and {files[0].name} shall hold parts of the same tensors: see {min(odd)}"
                )
        self.stored_names = list(stored)
        self._stored = set(stored)
        self._packed = {name.removesuffix(PACKED) for name in stored if name.endswith(PACKED)} if self.format else set()
        beside = {name + suffix for name in self._packed for suffix in (SCALES, SHAPE)}
        self.names = [
            name.removesuffix(PACKED) if name.removesuffix(PACKED) in self._packed else name
            for name in stored
            if name not in beside
        ]

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor; integers with scales as what their file says they become."""
        if len(self._opened) > 1:
            return self._assembled(name)
        if name not in self._packed:
            return self.stored(name)
        try:
            return plain(self.quantised(name))
        except ValueError as error:
            raise CheckpointError(f"{self._files[0]}: {name}: {error}. Convert the checkpoint again.") from None

    def stored(self, name: str) -> torch.Tensor:
        """One of `stored_names`, as it is in the file."""
        tensor: torch.Tensor = self._opened[0].get_tensor(name)
        return tensor

    def quantised(self, name: str) -> Quantised:
        """One of `names` as integers and scales. Raises CheckpointError when it is stored otherwise."""
        if self.format is None or name not in self._packed or name + SCALES not in self._stored:
            raise CheckpointError(
                f"{self._files[0]} has no integers and scales of {name}. Convert the checkpoint again."
            )
        return Quantised(self.format, self.stored(name + PACKED), self.stored(name + SCALES))

    def stacked_rows(self, name: str, experts: list[int], num_experts: int) -> torch.Tensor:
        """The experts' blocks of a tensor that stacks all experts along dim 0; one of another shape passes whole."""
        if len(self._opened) > 1:
            raise CheckpointError(
                f"{self._files[0]} has parts of {name}, which stacks all experts: that is not supported"
            )
        stacked = self._opened[0].get_slice(name)
        shape = stacked.get_shape()
        if not shape or shape[0] % num_experts:
            whole: torch.Tensor = stacked[:]
            return whole
        rows = shape[0] // num_experts
        return torch.cat([stacked[expert * rows : (expert + 1) * rows] for expert in experts])

    def _assembled(self, name: str) -> torch.Tensor:
        assembled_shape(name, [file.get_slice(name).get_shape() for file in self._opened], self._files)
        return torch.cat([file.get_tensor(name) for file in self._opened], dim=cut_dimension(name, self._files))


def tensor_sets(files: Iterable[str | Path]) -> Iterator[TensorSet]:
    """The files' sets, one open at a time. Raises CheckpointError, naming the file, for one that cannot be opened."""
    for group in shard_sets(Path(file) for file in files):
        with opened_set(group) as tensors:
            yield tensors


@contextmanager
def opened_set(files: tuple[Path, ...]) -> Iterator[TensorSet]:
    """One set of files, as shard_sets() makes them. Raises CheckpointError, naming the file that cannot be opened."""
    with _opened(files) as opened:
        yield TensorSet(files, opened)


def each_once(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` as they come. Raises CheckpointError for parts of tensors and packed integers: a loader that knows
    neither would leave a model that runs and talks nonsense.
    """
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen or name.endswith(PACKED):
            raise CheckpointError(
                f"{name} is stored in parts or packed, which vLLM's own loader cannot read. Serve the model with its "
                "experts in workers, or give vLLM load_format=switchyard-whole."
            )
        seen.add(name)
        yield name, tensor


@contextmanager
def _opened(files: tuple[Path, ...]) -> Iterator[list[Any]]:
    with ExitStack() as stack:
        opened = []
        for path in files:
            try:
                opened.append(stack.enter_context(safe_open(str(path), framework="pt")))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a complete safetensors file: {error}. Download it again."
                ) from None
        yield opened
