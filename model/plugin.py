"""Entry point of the vllm.general_plugins group: runs in the API process, the EngineCore and every vLLM worker.

It registers the Grok architecture and Switchyard's load formats for everybody, and remote experts only where the
engine's environment asks for them; without SWITCHYARD_FEED vLLM's MoE layers are the stock ones.
"""

import os

import torch

FEED_VARIABLE = "SWITCHYARD_FEED"


def register() -> None:
    """Register Switchyard's models and, if SWITCHYARD_FEED is set, its remote experts. Idempotent, as vLLM requires."""
    # Without it the first small request dies with SIGILL on CPUs with AMX (vLLM's CPU kernels assume it was called).
    torch.cpu._init_amx()

    from model import child_process, exact_float32, forked_process, grok, partial_loading

    exact_float32.ask_for()
    child_process.end_well()
    forked_process.use_nursery()
    grok.register()
    partial_loading.register()
    if os.environ.get(FEED_VARIABLE):
        from model import remote_experts

        remote_experts.register()
