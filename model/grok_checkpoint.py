"""Grok-1 as released (the ckpt-0 folder of xai-org/grok-1) -> safetensors with the names of xai-org/grok-2.

ckpt0_pickle reads a file's structure, ckpt0_layout knows the whole folder, ckpt0_pieces what is written; conversion
does it, file by file, and goes on where it was interrupted.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import CheckpointError
from model.ckpt0_checksums import known_checksums
from model.ckpt0_layout import RELEASED, inspect_ckpt0, tensor_paths
from model.ckpt0_pickle import inspect_file
from model.ckpt0_pieces import Experts, expert_storage, plan_pieces
from model.ckpt0_source import TensorReader
from model.conversion import Plan, Progress, convert
from model.licence import licence_files
from model.quantised import dequantise

__all__ = ["RELEASED", "CheckpointError", "Progress", "convert_ckpt0", "read_tensor"]


def read_tensor(path: Path, exact: bool = False) -> Tensor:
    """One file of ckpt-0 as float32 values of its own shape.

    A quantised tensor is int8 * scale, the product rounded to bfloat16 as xAI's code does; exact=True keeps the float32
    product. Raises CheckpointError.
    """
    with TensorReader(inspect_file(path)) as reader:
        values = reader.whole()
        if reader.tensor.scales is None:
            return values
        scales = reader.scales()
    rows, groups = values.shape[-2], scales.shape[-2]
    # The scales of a row, repeated, make every row a matrix of one group.
    flat = values.transpose(-1, -2).reshape(-1, rows)
    scales = scales.transpose(-1, -2).reshape(-1, groups)
    product = dequantise(flat, scales, torch.float32 if exact else torch.bfloat16).float()
    return product.view(values.transpose(-1, -2).shape).transpose(-1, -2).contiguous()


def convert_ckpt0(
    src: str | Path,
    dst: str | Path,
    exact: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    experts: Experts = "bf16",
    workers: int = 1,
    progress: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Write ckpt-0 folder `src` (or the folder it is in) as the Hugging Face model folder `dst`.

    A conversion that was interrupted is taken up where it was; one that is complete is verified. tokenizer.model and a
    licence file are copied when they are in `src`.
    exact: see read_tensor; such weights are stored as float32, the others as bfloat16 (norms, gate and embeddings are
    float32 in both, as in ckpt-0). config: fields of xAI's run.py that the files do not tell (key_size, the
    multipliers, sequence_len, num_selected_experts); those of the released model where it lacks them.
    experts: "int8" keeps the released weights and scales, "int4" makes new ones (model/quantised.py). workers: files
    written at the same time, each with about two gigabytes of memory at Grok-1's size. progress is called from several
    threads, one at a time.
    Raises CheckpointError naming a file that is missing, damaged or misplaced, ConfigError for a `dst` in use.
    """
    given = Path(src)
    source = _ckpt0_folder(given)
    checkpoint = inspect_ckpt0(source, config)
    storage = expert_storage(checkpoint, experts, exact)
    plan = Plan(
        pieces=plan_pieces(checkpoint, storage, exact),
        config=dict(checkpoint.config) | (storage.config() if storage is not None else {}),
        options={"experts": experts, "exact": exact, "config": dict(checkpoint.config)},
        checksums=known_checksums(tensor_paths(source)),
        companions=[
            path
            for folder in dict.fromkeys((given, source))
            for path in (folder / "tokenizer.model", *licence_files(folder))
        ],
    )
    convert(plan, Path(dst), workers, progress)


def _ckpt0_folder(source: Path) -> Path:
    inner = source / "ckpt-0"
    return inner if inner.is_dir() and not any(source.glob("tensor*")) else source
