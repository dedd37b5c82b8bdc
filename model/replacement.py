"""Replacing vLLM's RoutedExperts classes in every model that this process builds from now on."""

from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts


def routed_experts_classes() -> list[type[RoutedExperts]]:
    """RoutedExperts and the subclasses that models of vLLM 0.32 name; replacement goes by class name."""
    from vllm.model_executor.models.dbrx import DbrxExperts
    from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts
    from vllm.model_executor.models.transformers.moe import TransformersRoutedExperts

    return [RoutedExperts, DbrxExperts, GptOssRoutedExperts, TransformersRoutedExperts]


def replace_routed_experts(mixin: type) -> None:
    """Register mixin + class as the replacement of every RoutedExperts class, for models built from now on."""
    for base in routed_experts_classes():
        replacement = type(mixin.__name__.strip("_") + base.__name__, (mixin, base), {"__module__": mixin.__module__})
        PluggableLayer.register_oot(replacement, name=base.__name__)
