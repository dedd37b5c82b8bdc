"""Grok-1 and Grok-2 in vLLM: what the plugin calls, cheap to import.

The model itself is model/grok_model.py; vLLM imports it when a config names the architecture.
"""

from model.grok_spec import ARCHITECTURES


def register() -> None:
    """Tell vLLM about Grok's config and architecture. Idempotent, as vLLM requires of plugins."""
    from vllm import ModelRegistry

    from model.grok_config import register_config

    register_config()
    for architecture in ARCHITECTURES:
        if architecture not in ModelRegistry.models:
            ModelRegistry.register_model(architecture, "model.grok_model:Grok1ForCausalLM")
