"""Pure placement decisions: which experts make up which shard."""

from __future__ import annotations

from cluster.errors import ConfigError
from cluster.routing import Shard


def partition(num_layers: int, num_experts: int, num_shards: int) -> tuple[Shard, ...]:
    """Split every layer's experts into `num_shards` contiguous blocks, as evenly as possible.

    All shards span all MoE layers; sizes differ by at most one, the larger ones first.
    Raises ConfigError if a count is not positive or there are more shards than experts.
    """
    for name, value in (("num_layers", num_layers), ("num_experts", num_experts), ("num_shards", num_shards)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if num_shards > num_experts:
        raise ConfigError(
            f"{num_shards} shards need at least {num_shards} experts per layer; the model has {num_experts}"
        )
    size, extra = divmod(num_experts, num_shards)
    shards = []
    first = 0
    for shard_id in range(num_shards):
        end = first + size + (shard_id < extra)
        shards.append(Shard(shard_id, tuple(range(first, end)), 0, num_layers))
        first = end
    return tuple(shards)
