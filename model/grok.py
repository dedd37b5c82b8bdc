"""Grok-1 and Grok-2 in vLLM: what the plugin calls, cheap to import.

The model itself is model/grok_model.py; vLLM imports it when a config names the architecture.
"""

import json
from pathlib import Path
from typing import Any

from model.grok_spec import ARCHITECTURES, is_grok

# Files from which Transformers can build a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def register() -> None:
    """Tell vLLM about Grok's config and architecture. Idempotent, as vLLM requires of plugins."""
    from vllm import ModelRegistry

    from model.grok_config import register_config

    register_config()
    for architecture in ARCHITECTURES:
        if architecture not in ModelRegistry.models:
            ModelRegistry.register_model(architecture, "model.grok_model:Grok1ForCausalLM")


def tokenizer_args(model_path: str | Path) -> dict[str, Any]:
    """vLLM engine arguments for the tokenizer of a model.

    A Grok folder without a tokenizer that vLLM can read (xAI's Grok-2 has only tokenizer.tok.json, a converted Grok-1
    may have none) is served with prompts as token ids. Everything else gets vLLM's defaults: {}.
    """
    folder = Path(model_path)
    config = folder / "config.json"
    if not config.is_file() or not is_grok(json.loads(config.read_text(encoding="utf-8"))):
        return {}
    if any((folder / name).exists() for name in _TOKENIZER_FILES):
        return {}
    return {"skip_tokenizer_init": True}
