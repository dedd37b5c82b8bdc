"""Which files a conversion of ckpt-0 writes, and how each of their tensors comes from ckpt-0's files.

model-dense-outer and model-dense-layer-<l>: what an engine holds. model-experts-layer-<l>: the experts of layer l in
order, each with its w1, w3 and w2 side by side, so that a worker reads its own experts as one run of bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cluster.errors import CheckpointError
from model.ckpt0_layout import LAYER_FILES, OUTER_FILES, Ckpt0
from model.ckpt0_pickle import TensorFile
from model.ckpt0_source import TensorReader
from model.conversion_journal import FileState, PieceState
from model.int8_experts import METADATA_KEY, SCALE_SUFFIX, dequantise, metadata_value
from model.safetensors_writer import SafetensorsWriter, TensorEntry

Content = Literal["values", "transposed", "int8", "scales", "product"]
_ROWS_AT_ONCE_BYTES = 64 << 20
_DISTINCT_BYTES = 8192  # small sources may be equal: norms of all ones


@dataclass(frozen=True)
class OutTensor:
    """One tensor to write: `entry` is made from expert `part` (or all) of `source` as `content` says."""

    entry: TensorEntry
    source: TensorFile
    content: Content
    part: int | None = None


@dataclass(frozen=True)
class Piece:
    """One file to write, its tensors in order."""

    name: str
    tensors: tuple[OutTensor, ...]
    metadata: tuple[tuple[str, str], ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.entry.num_bytes for tensor in self.tensors)

    @property
    def sources(self) -> dict[str, Path]:
        return {tensor.source.path.name: tensor.source.path for tensor in self.tensors}


def plan_pieces(checkpoint: Ckpt0, experts: Literal["bf16", "int8"], exact: bool) -> list[Piece]:
    """The files to write. exact: products of int8 and scale stay float32 instead of being rounded to bfloat16."""
    plain = (("format", "pt"),)
    product = "float32" if exact else "bfloat16"
    expert_metadata = (*plain, (METADATA_KEY, metadata_value(product))) if experts == "int8" else plain
    outer = tuple(
        _float_tensor(f"{name}.weight", file) for name, file in zip(OUTER_FILES, checkpoint.outer, strict=True)
    )
    pieces = [Piece("model-dense-outer.safetensors", outer, plain)]
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
        routed = tuple(_expert_tensors(f"{prefix}block_sparse_moe.experts.", named, experts, exact))
        pieces.append(Piece(f"model-dense-layer-{number:05d}.safetensors", dense, plain))
        pieces.append(Piece(f"model-experts-layer-{number:05d}.safetensors", routed, expert_metadata))
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
    prefix: str, files: dict[str, TensorFile], experts: Literal["bf16", "int8"], exact: bool
) -> Iterator[OutTensor]:
    for expert in range(files[LAYER_FILES[0]].values.shape[0]):
        for which in ("w1", "w3", "w2"):
            file = files[f"block_sparse_moe.experts.{which}"]
            name = f"{prefix}{expert}.{which}.weight"
            if experts == "bf16":
                yield _product_tensor(name, file, exact, expert)
                continue
            assert file.scales is not None, "experts of ckpt-0 are quantised"
            rows, columns = file.values.shape[-2:]
            groups = file.scales.shape[-2]
            # The scales first: their bytes stay aligned, and whoever streams has them when the weight comes.
            yield OutTensor(TensorEntry(name + SCALE_SUFFIX, "BF16", (columns, groups)), file, "scales", expert)
            yield OutTensor(TensorEntry(name, "I8", (columns, rows)), file, "int8", expert)


def write_piece(
    piece: Piece, folder: Path, checksums: dict[str, str], written: Callable[[str, int], None]
) -> PieceState:
    """Write one file. checksums: the known SHA-256 of source files; written(tensor name, bytes) is called after each.

    Raises CheckpointError, naming the source, for numbers that are not finite or a file of another checksum; what
    `written` raises passes through. In either case the file does not appear.
    """
    times = {name: path.stat().st_mtime_ns for name, path in piece.sources.items()}
    entries = [tensor.entry for tensor in piece.tensors]
    with ExitStack() as stack:
        out = stack.enter_context(SafetensorsWriter(folder / piece.name, entries, dict(piece.metadata)))
        readers = {
            tensor.source.path.name: stack.enter_context(TensorReader(tensor.source))
            for tensor in {tensor.source.path: tensor for tensor in piece.tensors}.values()
        }
        for tensor in piece.tensors:
            for block in _blocks(tensor, readers[tensor.source.path.name]):
                out.write(block)
            written(tensor.entry.name, tensor.entry.num_bytes)
        sources = {
            name: FileState(reader.tensor.num_bytes, reader.finish(), times[name]) for name, reader in readers.items()
        }
        check_checksums(piece, sources, checksums)
        return PieceState(FileState(out.num_bytes, out.commit()), sources)


def _blocks(tensor: OutTensor, reader: TensorReader) -> Iterator[Tensor]:
    """The tensor's values in order, in contiguous blocks."""
    if tensor.content == "values":
        yield from reader.chunks()
    elif tensor.content == "transposed":
        yield reader.whole().T.contiguous()
    elif tensor.content == "scales":
        yield _scales(tensor, reader)
    elif tensor.content == "int8":
        yield _weight(tensor, reader)
    else:
        scales_OG, weight_OI = _scales(tensor, reader), _weight(tensor, reader)
        dtype = torch.float32 if tensor.entry.dtype == "F32" else torch.bfloat16
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


def check_checksums(piece: Piece, sources: Mapping[str, FileState], checksums: Mapping[str, str]) -> None:
    """Raises CheckpointError, naming the source, when a piece was made from a file of another checksum."""
    for name, state in sources.items():
        if checksums.get(name, state.sha256) != state.sha256:
            raise CheckpointError(
                f"{piece.sources[name]} has SHA-256 {state.sha256}, but the download was to have {checksums[name]}: "
                "it is damaged, or another file under this name. Download it again."
            )


def check_distinct(states: Sequence[PieceState]) -> None:
    """No two large sources may be the same file: one of them would be a copy in another's place."""
    seen: dict[str, str] = {}
    for name, file in (item for state in states for item in sorted(state.sources.items())):
        if file.num_bytes >= _DISTINCT_BYTES and (other := seen.setdefault(file.sha256, name)) != name:
            raise CheckpointError(f"{other} and {name} are the same file, byte by byte. Download both again.")
