"""Checkpoints of random numbers, written slab by slab: what a benchmark needs of a model whose weights are not there.

Matrices are N(0, 1 / inputs), so that activations stay of the order of one through any number of layers; vectors are
norms, near 1 and all different, because a conversion takes equal files for copies. int8 weights are uniform.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from model.ckpt0_encoding import ArraySpec, Part, part_bytes
from model.conversion import Progress
from model.safetensors_writer import SafetensorsWriter, TensorEntry, header_bytes, write_json

SLAB_NUMBERS = 1 << 24  # 64 MiB of float32
INDEX_FILE = "model.safetensors.index.json"
_BF16_BYTES = 2
_NORM_STD = 0.05
_INT8_LIMIT = 127
_INT8_STD = math.sqrt(((2 * _INT8_LIMIT + 1) ** 2 - 1) / 12)  # of a uniform integer from -127 to 127
_METADATA = {"format": "pt"}

Shapes = Mapping[str, tuple[int, ...]]
Written = Callable[[int], None]


class RandomFile(Protocol):
    """One file to write."""

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    def write(self, folder: Path, generator: Generator, written: Written) -> None:
        """Write it; written(bytes) is called after each slab."""


@dataclass(frozen=True)
class RandomCheckpoint:
    """Files, the config.json beside them, and the content of the index where the layout has one.

    vocab_size: of the tokenizer that belongs beside them, in tokens; None where it is not kept there.
    """

    files: Sequence[RandomFile]
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    vocab_size: int | None

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def write(self, folder: Path, seed: int, progress: Callable[[Progress], None]) -> None:
        """Write everything but the tokenizer into `folder`, in slabs of bounded size. Equal seeds, equal bytes."""
        generator = Generator().manual_seed(seed)
        write_json(folder / "config.json", self.config)
        if self.index is not None:
            write_json(folder / INDEX_FILE, self.index)
        counter = _Counter(self.num_bytes, len(self.files), progress)
        for file in self.files:
            file.write(folder, generator, partial(counter.add, file.name))
            counter.finish(file.name)


class _Counter:
    """Bytes and files so far."""

    def __init__(self, total_bytes: int, num_files: int, progress: Callable[[Progress], None]):
        self._total_bytes = total_bytes
        self._num_files = num_files
        self._progress = progress
        self._done_bytes = self._num_files_done = 0
        self._report("config.json")

    def add(self, name: str, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        self._report(name)

    def finish(self, name: str) -> None:
        self._num_files_done += 1
        self._report(name)

    def _report(self, last: str) -> None:
        self._progress(Progress(self._total_bytes, self._done_bytes, 0, self._num_files, self._num_files_done, last))


@dataclass(frozen=True)
class SafetensorsFile:
    """bfloat16 tensors; matrices [out, in].

    num_input_shards: into how many parts, each in a file of its own, the inputs of the matrices were cut.
    """

    name: str
    shapes: Shapes
    num_input_shards: int = 1

    @property
    def num_bytes(self) -> int:
        entries = self._entries()
        return len(header_bytes(entries, _METADATA)) + sum(entry.num_bytes for entry in entries)

    def write(self, folder: Path, generator: Generator, written: Written) -> None:
        entries = self._entries()
        with SafetensorsWriter(folder / self.name, entries, _METADATA) as out:
            written(len(header_bytes(entries, _METADATA)))
            for entry in entries:
                for slab in random_floats(entry.shape, entry.shape[-1] * self.num_input_shards, generator):
                    out.write(slab.to(torch.bfloat16))
                    written(_BF16_BYTES * slab.numel())
            out.commit()

    def _entries(self) -> list[TensorEntry]:
        return [TensorEntry(name, "BF16", tuple(shape)) for name, shape in self.shapes.items()]


@dataclass(frozen=True)
class Ckpt0File:
    """One file of Grok-1's ckpt-0. num_inputs: of the matrix in it; for a norm it counts for nothing."""

    name: str
    parts: Sequence[Part]
    num_inputs: int

    @property
    def num_bytes(self) -> int:
        return sum(map(part_bytes, self.parts))

    def write(self, folder: Path, generator: Generator, written: Written) -> None:
        with (folder / self.name).open("wb") as out:
            for part in self.parts:
                if isinstance(part, bytes):
                    out.write(part)
                    written(len(part))
                    continue
                for slab in self._numbers(part, generator):
                    written(out.write(slab.view(torch.uint8).numpy().data))

    def _numbers(self, array: ArraySpec, generator: Generator) -> Iterator[Tensor]:
        if array.dtype == "I8":
            return _integers(math.prod(array.shape), generator)
        if array.dtype == "BF16":
            return _scales(math.prod(array.shape), self.num_inputs, generator)
        return random_floats(array.shape, self.num_inputs, generator)


def random_floats(shape: Sequence[int], num_inputs: int, generator: Generator) -> Iterator[Tensor]:
    """A tensor's numbers in C order, float32 slabs of one dimension."""
    mean, std = (1.0, _NORM_STD) if len(shape) == 1 else (0.0, num_inputs**-0.5)
    for count in _slabs(math.prod(shape)):
        yield torch.randn(count, generator=generator).mul_(std).add_(mean)


def _integers(count: int, generator: Generator) -> Iterator[Tensor]:
    """int8 slabs. Eight numbers are drawn at once, which is some eight times faster than one by one."""
    for size in _slabs(count):
        words = torch.empty(-(-size // 8), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
        yield words.view(torch.int8)[:size].clamp_(min=-_INT8_LIMIT)


def _scales(count: int, num_inputs: int, generator: Generator) -> Iterator[Tensor]:
    """bfloat16 slabs: what makes uniform int8 weights N(0, 1 / inputs) in size, half as much more or less of it."""
    middle = 1 / (_INT8_STD * math.sqrt(num_inputs))
    for size in _slabs(count):
        yield torch.rand(size, generator=generator).add_(0.5).mul_(middle).to(torch.bfloat16)


def _slabs(count: int) -> Iterator[int]:
    for first in range(0, count, SLAB_NUMBERS):
        yield min(SLAB_NUMBERS, count - first)


def hub_checkpoint(files: Iterable[Shapes], config: Mapping[str, Any], vocab_size: int) -> RandomCheckpoint:
    """Hugging Face's layout: the tensors of each file in turn, and an index."""
    plan = list(files)
    named = [
        SafetensorsFile(f"model-{number:05d}-of-{len(plan):05d}.safetensors", shapes)
        for number, shapes in enumerate(plan, start=1)
    ]
    total_bytes = sum(_BF16_BYTES * math.prod(shape) for file in named for shape in file.shapes.values())
    weight_map = {name: file.name for file in named for name in file.shapes}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    return RandomCheckpoint(named, config, index, vocab_size)
