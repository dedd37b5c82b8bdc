"""vLLM model loaders that read a part of a checkpoint: everything but routed experts, or only some routed experts.

Both read what vLLM's own loader cannot: tensors cut for tensor parallelism, and Grok-1's int8 experts. A third loader
does that for a model that keeps its experts.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from model.expert_weights import dense_weights, is_expert_tensor, whole_weights

DENSE_LOAD_FORMAT = "switchyard-dense"
WHOLE_LOAD_FORMAT = "switchyard-whole"

Reader = Callable[[Iterable[str]], Iterator[tuple[str, torch.Tensor]]]


class PartialLoader(DefaultModelLoader):
    """vLLM's default loader with the reading of safetensors files replaced by `read`.

    Other file formats (.bin, .pt) cannot be read in part: they are read whole and filtered by `keep`.
    """

    def __init__(self, load_config: LoadConfig, read: Reader, keep: Callable[[str], bool] = lambda name: True):
        super().__init__(dataclasses.replace(load_config, load_format="auto"))
        self._read = read
        self._keep = keep

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, torch.Tensor]]:
        _, files, use_safetensors, _ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        self.counter_before_loading_weights: float = time.perf_counter()  # for vLLM's log line
        if use_safetensors:
            return ((source.prefix + name, tensor) for name, tensor in self._read(sorted(files)))
        weights = super()._get_weights_iterator(source)
        return ((name, tensor) for name, tensor in weights if self._keep(name))


class DenseLoader(PartialLoader):
    """Loads everything but the routed experts: what an engine with remote experts holds."""

    def __init__(self, load_config: LoadConfig):
        super().__init__(load_config, dense_weights, lambda name: not is_expert_tensor(name))


class WholeLoader(PartialLoader):
    """Loads everything: for an engine that keeps its experts."""

    def __init__(self, load_config: LoadConfig):
        super().__init__(load_config, whole_weights)


@functools.cache
def register() -> None:
    """Make the load formats switchyard-dense and switchyard-whole known to vLLM. Idempotent."""
    register_model_loader(DENSE_LOAD_FORMAT)(DenseLoader)
    register_model_loader(WHOLE_LOAD_FORMAT)(WholeLoader)
