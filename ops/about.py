"""What the console says about a cluster that does not change while it runs."""

import time
from typing import Any

from ops.version import installed


def about(plan: Any, http: str) -> dict[str, Any]:
    """Of a deployments.app.Plan with experts, served at the base URL `http`; in plain JSON types."""
    from deployments.models import has_tokenizer, licence_summary

    settings, spec = plan.settings, plan.spec
    return {
        "model": settings.name,
        "folder": settings.model,
        "http": http,
        "version": installed("switchyard"),
        "started_s": time.time(),
        "layers": spec.num_layers,
        "experts": spec.num_experts,
        "top_k": spec.top_k,
        "hidden_size": spec.hidden_size,
        "dtype": str(spec.dtype),
        "checkpoint_bytes": plan.checkpoint_bytes,
        "expert_bytes": plan.expert_bytes,
        "planned": {
            "engines": settings.engines,
            "engine_range": [settings.fewest_engines, settings.most_engines],
            "shards": settings.workers,
            "replicas": settings.replicas,
        },
        "has_tokenizer": has_tokenizer(settings.model),
        "licence": licence_summary(settings.model),
    }
