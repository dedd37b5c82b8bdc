"""What an application's settings come to for its checkpoint: what can be known, and wrong, before a start. No Ray."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from cluster.config import Settings, parse_settings
from cluster.errors import ConfigError
from cluster.layout import check_engine_nodes, shards_of
from deployments.models import check_licence, resolve_model
from model.expert_weights import is_expert_tensor
from model.integer_experts import loaded_bytes_per_stored
from model.moe_spec import MoeSpec, inspect_checkpoint, read_header_or_raise, weight_files


@dataclasses.dataclass(frozen=True)
class Plan:
    """What build_app is going to start.

    spec is None for a dense model, which needs no workers; the sizes are those of the checkpoint's tensors on disk.
    """

    settings: Settings
    spec: MoeSpec | None
    checkpoint_bytes: int
    expert_bytes: int


def make_plan(args: Mapping[str, Any]) -> Plan:
    """Check everything that can be checked without starting anything. Raises ConfigError, saying what to do."""
    settings = parse_settings(args)
    settings = dataclasses.replace(settings, model=str(resolve_model(settings.model)), served_model_name=settings.name)
    check_licence(settings)
    spec = inspect_checkpoint(settings.model, settings.dtype)
    check_engine_nodes(settings)
    if spec is not None:
        if settings.layout is None and settings.workers > spec.num_experts:
            raise ConfigError(
                f"workers: is {settings.workers}, but the model has {spec.num_experts} experts per layer. "
                f"Use at most {spec.num_experts}."
            )
        shards_of(settings, spec.num_layers, spec.num_experts)
    return Plan(settings, spec, *_sizes(settings.model))


def _sizes(model: str) -> tuple[int, int]:
    """Bytes of all tensors of the checkpoint, and of its routed experts; integers count as what they are loaded as."""
    total = experts = 0
    for path in weight_files(Path(model)):
        factor = loaded_bytes_per_stored(path)
        for name, entry in read_header_or_raise(path).items():
            low, high = cast(tuple[int, int], entry["data_offsets"])
            num_bytes = (high - low) * (factor if entry["dtype"] == "I32" else 1)
            total += num_bytes
            experts += num_bytes * is_expert_tensor(name)
    return total, experts
