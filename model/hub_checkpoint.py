"""A Hugging Face folder, Grok-2 as published or any mixture of experts with numbered experts, with integer experts."""

import json
from collections.abc import Callable
from pathlib import Path

from cluster.errors import CheckpointError
from model.ckpt0_checksums import known_checksums
from model.conversion import Plan, Progress, convert
from model.expert_weights import expert_of, is_expert_tensor
from model.hub_pieces import Matrix, find_matrices, plan_pieces
from model.licence import licence_files
from model.moe_spec import inspect_checkpoint, read_config, read_header_or_raise, weight_files
from model.quantised import Precision, Storage, common_group

_PLAIN = ("BF16", "F16", "F32")
# What belongs to a model beside its weights; config.json is written anew.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "README.md")
_NOT_COMPANIONS = ("config.json", "model.safetensors.index.json")


def is_hub_folder(source: Path) -> bool:
    """Whether convert_hub() is for it: config.json and safetensors files."""
    return (source / "config.json").is_file() and any(source.glob("*.safetensors"))


def convert_hub(
    src: str | Path,
    dst: str | Path,
    experts: Precision,
    *,
    workers: int = 1,
    progress: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Write folder `src` as `dst` with its routed experts as integers, a scale for every 128 inputs.

    Experts that 128 does not divide get groups of a smaller power of two. An interrupted conversion is taken up where
    it was; one that is complete is verified. Tokenizer, licence and the like are copied. workers: files written at the
    same time, each with the memory of two matrices. Raises CheckpointError for a source that is incomplete, has no
    experts, or whose experts cannot be converted; ConfigError for a `dst` in use.
    """
    source = Path(src)
    config = read_config(source)
    if "quantization_config" in config:
        raise CheckpointError(f"{source} is quantised already: serve it as it is.")
    if inspect_checkpoint(str(source)) is None:
        raise CheckpointError(f"{source} has no routed experts: there is nothing to convert.")
    files = weight_files(source)
    matrices = find_matrices({path: read_header_or_raise(path) for path in files})
    routed = [matrix for matrix in matrices if is_expert_tensor(matrix.name)]
    _check(routed)
    group = common_group(sorted({matrix.shape[1] for matrix in routed}), f"--experts {experts}")
    storage = Storage(experts, "float32", group)
    plan = Plan(
        pieces=plan_pieces(matrices, storage),
        config=config | storage.config(),
        options={"experts": experts, "config": json.loads(json.dumps(config))},
        checksums=known_checksums(files),
        companions=_companions(source),
    )
    convert(plan, Path(dst), workers, progress)


def _check(routed: list[Matrix]) -> None:
    for matrix in routed:
        is_matrix = len(matrix.shape) == 2 and matrix.dtype in _PLAIN and matrix.name.endswith(".weight")
        if not is_matrix or expert_of(matrix.name) is None:
            raise CheckpointError(
                f"{matrix.files[0]} has {matrix.name} as {matrix.dtype} {list(matrix.shape)}. Experts can be converted "
                "where each is numbered and has plain matrices; serve this checkpoint as it is."
            )


def _companions(source: Path) -> list[Path]:
    found = {path for pattern in _COMPANIONS for path in source.glob(pattern) if path.name not in _NOT_COMPANIONS}
    return sorted(found | set(licence_files(source)))
