"""Checkpoints whose tensors are cut for tensor parallelism, one part per file: xai-org/grok-2 as published.

`pytorch_model-00006-TP-000.safetensors` .. `-TP-007.safetensors` hold tensors of the same names, an eighth of each;
`-TP-common` files hold whole tensors. Loaded by name alone, seven eighths would be lost. Nothing but the tensor's name
tells along which dimension it was cut: the rule is Megatron's, as in SGLang's loader (srt/models/grok.py).
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from cluster.errors import CheckpointError

_SHARD = re.compile(r"(.+)-TP-(\d{3})\.safetensors")

# Module name -> dimension of [out, in] along which ranks are concatenated.
_CUT_DIMENSION = dict.fromkeys(
    ("w1", "w3", "gate_proj", "up_proj", "q_proj", "k_proj", "v_proj", "embed_tokens", "lm_head"), 0
) | dict.fromkeys(("w2", "down_proj", "o_proj"), 1)


def is_sharded(files: Iterable[Path]) -> bool:
    """True when some of the files hold parts of tensors."""
    return any(_SHARD.fullmatch(path.name) for path in files)


def shard_sets(files: Iterable[Path]) -> list[tuple[Path, ...]]:
    """The files in sets that hold parts of the same tensors, in rank order; a file of whole tensors is a set of one.

    Raises CheckpointError, naming the file, when a rank is missing.
    """
    sets: dict[tuple[Path, str], dict[int, Path]] = {}
    for path in sorted(files):
        match = _SHARD.fullmatch(path.name)
        key, rank = (match[1], int(match[2])) if match else (path.name, 0)
        sets.setdefault((path.parent, key), {})[rank] = path
    num_ranks = max((len(ranks) for ranks in sets.values()), default=0)
    num_ranks = max([num_ranks, *(rank + 1 for ranks in sets.values() for rank in ranks)])
    for (folder, stem), ranks in sets.items():
        if not _SHARD.fullmatch(ranks[min(ranks)].name):
            continue
        for rank in range(num_ranks):
            if rank not in ranks:
                missing = folder / f"{stem}-TP-{rank:03d}.safetensors"
                raise CheckpointError(
                    f"{missing} is missing: the checkpoint's tensors are cut into {num_ranks} parts. Download it."
                )
    return [tuple(ranks[rank] for rank in sorted(ranks)) for ranks in sets.values()]


def cut_dimension(name: str, files: Sequence[Path]) -> int:
    """Along which dimension the parts of a tensor lie. Raises CheckpointError when the name does not tell."""
    parts = name.split(".")
    dimension = _CUT_DIMENSION.get(parts[-2]) if len(parts) > 1 and parts[-1] == "weight" else None
    if dimension is None:
        raise CheckpointError(
            f"{files[0]} and {len(files) - 1} others hold parts of {name}; how it was cut is not known"
        )
    return dimension


def assembled_shape(name: str, shapes: Sequence[Sequence[int]], files: Sequence[Path]) -> tuple[int, ...]:
    """Shape of the tensor whose parts in `files` have `shapes`. Raises CheckpointError when they do not add up."""
    if len(shapes) == 1:
        return tuple(shapes[0])
    dimension = cut_dimension(name, files)
    first = tuple(shapes[0])
    for shape, path in zip(shapes, files, strict=True):
        if tuple(shape) != first or len(first) <= dimension:
            raise CheckpointError(f"{path} has {name} as {list(shape)}, but {files[0].name} as {list(first)}")
    return (*first[:dimension], first[dimension] * len(shapes), *first[dimension + 1 :])
