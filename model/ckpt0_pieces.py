"""Which files a conversion of ckpt-0 writes, and how each of their tensors comes from ckpt-0's files.

model-dense-outer and model-dense-layer-<l>: what an engine holds. model-experts-layer-<l>: the experts of layer l in
order, each with its w1, w3 and w2 side by side, so that a worker reads its own experts as one run of bytes.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model.ckpt0_layout import LAYER_FILES, OUTER_FILES, Ckpt0
from model.ckpt0_pickle import TensorFile
from model.ckpt0_source import TensorReader
from model.conversion import Written, check_checksums
from model.conversion_journal import FileState, PieceState
from model.quantised import GROUP_SIZE, METADATA_KEY, Storage, common_group, dequantise, pack, quantise
from model.safetensors_writer import SafetensorsWriter, TensorEntry

Experts = Literal["bf16", "int8", "int4"]
Content = Literal["values", "transposed", "product", "shape", "scales", "packed"]
_ROWS_AT_ONCE_BYTES = 64 << 20


@dataclass(frozen=True)
class OutTensor:
    """One tensor to write: `entry` is made from expert `part` (or all) of `source` as `content` says."""

    entry: TensorEntry
    source: TensorFile
    content: Content
    part: int | None = None


@dataclass(frozen=True)
class Piece:
    """One file to write, its tensors in order; storage: of the experts in it, None for plain weights."""

    name: str
    tensors: tuple[OutTensor, ...]
    storage: Storage | None = None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.entry.num_bytes for tensor in self.tensors)

    @property
    def tensor_names(self) -> list[str]:
        return [tensor.entry.name for tensor in self.tensors]

    @property
    def sources(self) -> dict[str, Path]:
        return {tensor.source.path.name: tensor.source.path for tensor in self.tensors}

    def write(self, folder: Path, checksums: Mapping[str, str], written: Written) -> PieceState:
        """See model/conversion.py."""
        times = {name: path.stat().st_mtime_ns for name, path in self.sources.items()}
        entries = [tensor.entry for tensor in self.tensors]
        metadata = {"format": "pt"} | ({METADATA_KEY: self.storage.metadata} if self.storage is not None else {})
        with ExitStack() as stack:
            out = stack.enter_context(SafetensorsWriter(folder / self.name, entries, metadata))
            readers = {
                tensor.source.path.name: stack.enter_context(TensorReader(tensor.source))
                for tensor in {tensor.source.path: tensor for tensor in self.tensors}.values()
            }
            contents = _Contents(self.storage)
            for tensor in self.tensors:
                for block in contents.blocks(tensor, readers[tensor.source.path.name]):
                    out.write(block)
                written(tensor.entry.name, tensor.entry.num_bytes)
            sources = {
                name: FileState(reader.tensor.num_bytes, reader.finish(), times[name])
                for name, reader in readers.items()
            }
            check_checksums(self, sources, checksums)
            return PieceState(FileState(out.num_bytes, out.commit()), sources)


def expert_storage(checkpoint: Ckpt0, experts: Experts, exact: bool) -> Storage | None:
    """How the experts will be stored. int8 keeps the released integers and scales.

    A scale is repeated for every 128 of its inputs, as vLLM's kernels want it; where they do not divide, which no
    released model has, there are as many scales as were released. Raises ConfigError when int4 cannot be packed.
    """
    if experts == "bf16":
        return None
    up, down = (checkpoint.layers[0][LAYER_FILES.index(f"block_sparse_moe.experts.{name}")] for name in ("w1", "w2"))
    if experts == "int4":
        return Storage(
            "int4", "float32", common_group([file.values.shape[-2] for file in (up, down)], "--experts int4")
        )
    assert up.scales is not None and down.scales is not None, "experts of ckpt-0 are quantised"
    groups = [file.values.shape[-2] // file.scales.shape[-2] for file in (up, down) if file.scales is not None]
    fits = not any(size % GROUP_SIZE for size in groups)
    return Storage("int8", "float32" if exact else "bfloat16", GROUP_SIZE if fits else None)


def plan_pieces(checkpoint: Ckpt0, storage: Storage | None, exact: bool) -> list[Piece]:
    """The files to write. exact: products of int8 and scale stay float32 instead of being rounded to bfloat16."""
    outer = tuple(
        _float_tensor(f"{name}.weight", file) for name, file in zip(OUTER_FILES, checkpoint.outer, strict=True)
    )
    pieces = [Piece("model-dense-outer.safetensors", outer)]
    for number, files in enumerate(checkpoint.layers):
        prefix = f"model.layers.{number}."
        named = dict(zip(LAYER_FILES, files, strict=True))
        dense = tuple(
            _product_tensor(f"{prefix}{name}.weight", file, exact, None)
            if file.scales is not None
            else _float_tensor(f"{prefix}{name}.weight", file)
            for name, file in named.items()
            if ".experts." not in name
        )
        routed = tuple(_expert_tensors(f"{prefix}block_sparse_moe.experts.", named, storage, exact))
        pieces.append(Piece(f"model-dense-layer-{number:05d}.safetensors", dense))
        pieces.append(Piece(f"model-experts-layer-{number:05d}.safetensors", routed, storage))
    return pieces


def _float_tensor(name: str, file: TensorFile) -> OutTensor:
    shape = file.values.shape
    if name.endswith(".gate.weight"):
        return OutTensor(TensorEntry(name, "F32", shape[::-1]), file, "transposed")
    return OutTensor(TensorEntry(name, "F32", shape), file, "values")


def _product_tensor(name: str, file: TensorFile, exact: bool, part: int | None) -> OutTensor:
    rows, columns = file.values.shape[-2:]
    return OutTensor(TensorEntry(name, "F32" if exact else "BF16", (columns, rows)), file, "product", part)


def _expert_tensors(
    prefix: str, files: dict[str, TensorFile], storage: Storage | None, exact: bool
) -> Iterator[OutTensor]:
    for expert in range(files[LAYER_FILES[0]].values.shape[0]):
        for which in ("w1", "w3", "w2"):
            file = files[f"block_sparse_moe.experts.{which}"]
            name = f"{prefix}{expert}.{which}.weight"
            if storage is None:
                yield _product_tensor(name, file, exact, expert)
                continue
            assert file.scales is not None, "experts of ckpt-0 are quantised"
            rows, columns = file.values.shape[-2:]
            groups = rows // storage.group if storage.group is not None else file.scales.shape[-2]
            contents: tuple[Content, ...] = ("shape", "scales", "packed")
            for entry, content in zip(storage.entries(name, columns, rows, groups), contents, strict=True):
                yield OutTensor(entry, file, content, expert)


class _Contents:
    """What a piece's tensors hold. Scales and integers of a matrix are made at once: its file is read in order."""

    def __init__(self, storage: Storage | None):
        self._storage = storage
        self._matrix: tuple[OutTensor, Tensor, Tensor] | None = None

    def blocks(self, tensor: OutTensor, reader: TensorReader) -> Iterator[Tensor]:
        """The tensor's values in order, in contiguous blocks."""
        if tensor.content == "values":
            yield from reader.chunks()
        elif tensor.content == "transposed":
            yield reader.whole().T.contiguous()
        elif tensor.content == "product":
            dtype = torch.float32 if tensor.entry.dtype == "F32" else torch.bfloat16
            yield from _products(_scales(tensor, reader), _weight(tensor, reader), dtype)
        elif tensor.content == "shape":
            rows, columns = tensor.source.values.shape[-2:]
            yield torch.tensor([columns, rows])
        else:
            packed_OW, scales_OG = self._quantised(tensor, reader)
            yield scales_OG if tensor.content == "scales" else packed_OW

    def _quantised(self, tensor: OutTensor, reader: TensorReader) -> tuple[Tensor, Tensor]:
        assert self._storage is not None, "only experts that are stored as integers have scales"
        if self._matrix is not None:
            of, packed_OW, scales_OG = self._matrix
            if (of.source, of.part) == (tensor.source, tensor.part):
                return packed_OW, scales_OG
            self._matrix = None
        scales_OG, integers_OI = _scales(tensor, reader), _weight(tensor, reader)
        group = self._storage.group
        if self._storage.precision == "int4":
            assert group is not None, "int4 has groups of its own"
            weight_OI = dequantise(integers_OI, scales_OG, torch.float32)
            integers_OI, scales_OG = quantise(weight_OI, self._storage.bits, group)
        elif group is not None:
            scales_OG = scales_OG.repeat_interleave(integers_OI.shape[1] // group // scales_OG.shape[1], dim=1)
        packed_OW = pack(integers_OI, self._storage.bits)
        self._matrix = tensor, packed_OW, scales_OG
        return packed_OW, scales_OG


def _products(scales_OG: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    rows = max(1, _ROWS_AT_ONCE_BYTES // (4 * weight_OI.shape[1]))
    for first in range(0, len(weight_OI), rows):
        yield dequantise(weight_OI[first : first + rows], scales_OG[first : first + rows], dtype)


def _weight(tensor: OutTensor, reader: TensorReader) -> Tensor:
    """int8 [out, in]."""
    weight_IO = reader.whole() if tensor.part is None else reader.part(tensor.part)
    return weight_IO.T.contiguous()


def _scales(tensor: OutTensor, reader: TensorReader) -> Tensor:
    """bfloat16 [out, groups]."""
    scales = reader.scales()
    return (scales if tensor.part is None else scales[tensor.part]).T.contiguous()
