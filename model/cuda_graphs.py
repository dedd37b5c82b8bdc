"""vLLM's compilation_config for an engine on a GPU whose experts are elsewhere.

A layer call waits for other processes, so no CUDA graph can hold one. vLLM captures piecewise what lies between
attention calls; here the graphs end before every MoE layer too, and begin again behind it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError

# On GPUs vLLM 0.32 wraps MoE layers in these operators (model_executor/layers/fused_moe/runner/moe_runner.py,
# model_executor/models/transformers/moe.py), Switchyard's own are inside.
_MOE_LAYERS = ("vllm::moe_forward", "vllm::moe_forward_shared", "vllm::transformers_moe_forward")
# What CompilationConfig.set_splitting_ops_for_v1 adds to attention where nothing is configured.
_KV_CACHE_UPDATES = ("vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update")
_MODES = ("PIECEWISE", "NONE")
# They slice what experts answer, which vLLM 0.32 cannot write down behind a graph's end (compilation/codegen.py,
# getitem): they run without torch.compile.
_SLICING = ("GptOssForCausalLM",)


def around_moe_layers(configured: Any, model: str) -> dict[str, Any]:
    """`configured`, engine.vllm.compilation_config, and what remote experts of that checkpoint need.

    Raises ConfigError.
    """
    from vllm.config import CompilationConfig

    if not isinstance(configured, Mapping):
        raise ConfigError("engine.vllm.compilation_config: must be a mapping.")
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    if set(config.get("architectures") or ()) & set(_SLICING):
        return {**configured, "mode": 0, "cudagraph_mode": "NONE"}
    mode = configured.get("cudagraph_mode", "PIECEWISE")
    if mode not in _MODES:
        raise ConfigError(
            f"engine.vllm.compilation_config.cudagraph_mode: is {mode!r}, but no CUDA graph can hold a layer whose "
            f"experts are in workers. Use {' or '.join(_MODES)}."
        )
    ends = configured.get("splitting_ops") or [*CompilationConfig._attention_ops, *_KV_CACHE_UPDATES]
    return {**configured, "cudagraph_mode": mode, "splitting_ops": [*dict.fromkeys([*ends, *_MOE_LAYERS])]}
