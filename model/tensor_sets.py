"""Tensors by name from safetensors files, whole and plain, however they are stored: cut for TP, or int8 with scales."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError
from model.int8_experts import SCALE_SUFFIX, dequantise, product_dtype
from model.tp_shards import assembled_shape, cut_dimension, shard_sets


class TensorSet:
    """Open files that hold parts of the same tensors (see shard_sets), usually one; reads only what is asked for."""

    def __init__(self, files: tuple[Path, ...], opened: list[Any]):
        self._files = files
        self._opened = opened
        self._product = product_dtype(opened[0].metadata(), str(files[0]))
        stored = opened[0].offset_keys()
        for path, other in zip(files, opened, strict=True):
            odd = set(stored) ^ set(other.keys())
            if odd:
                raise CheckpointError(
                    f"{path} and {files[0].name} shall hold parts of the same tensors: see {min(odd)}"
                )
        self._scales = {name for name in stored if name.endswith(SCALE_SUFFIX)} if self._product else set()
        self.names = [name for name in stored if name not in self._scales]

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor; int8 experts as what their file says they become."""
        if len(self._opened) > 1:
            return self._assembled(name)
        tensor: torch.Tensor = self._opened[0].get_tensor(name)
        if name + SCALE_SUFFIX not in self._scales:
            return tensor
        assert self._product is not None, "only files with a product have scales"
        try:
            return dequantise(tensor, self._opened[0].get_tensor(name + SCALE_SUFFIX), self._product)
        except ValueError as error:
            raise CheckpointError(f"{self._files[0]}: {name}: {error}. Convert the checkpoint again.") from None

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
        with _opened(group) as opened:
            yield TensorSet(group, opened)


def each_once(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` as they come. Raises CheckpointError for parts of tensors and int8 experts: a loader that knows neither
    would leave a model that runs and talks nonsense.
    """
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen or tensor.dtype == torch.int8:
            raise CheckpointError(
                f"{name} is stored in parts or as int8, which vLLM's own loader cannot read. Serve the model with its "
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
