"""The ray-config.yaml of a plan: what deploys exactly that, and nothing else."""

import math
from typing import Any

import yaml

from cluster.config import LayoutSettings, parse_settings
from cluster.layout import all_nodes
from cluster.planner import ClusterPlan
from deployments.models import DEMO_MODEL, find_model, resolve_model
from ops.serve_config import IMPORT_PATH

_GIB = 1 << 30
_BATCHED_TOKENS = 2048

_HEAD = """\
# Written by `switchyard plan`: {model}, experts in {precision}, {concurrency} requests of {context} tokens at a time.
#
#   switchyard serve --config FILE     where the plan is for this machine alone
#   serve run FILE                     on a Ray cluster whose nodes have these labels (ray start --labels KEY=VALUE):
{labels}
#
# {model_note}
"""


def config_text(plan: ClusterPlan, model: str) -> str:
    """The file's text. `model` is what --model named; a catalog name stands for the folder /models/NAME."""
    path, note = _checkpoint(model)
    labels = "\n".join(f"#     switchyard-node={name}" for name in all_nodes(plan.layout))
    head = _HEAD.format(
        model=plan.model.name,
        precision=plan.model.precision,
        concurrency=plan.wishes.concurrency,
        context=plan.wishes.context_tokens,
        labels=labels,
        model_note=note,
    )
    return head + yaml.dump(_document(plan, path), Dumper=_Dumper, sort_keys=False, width=120)


def _checkpoint(model: str) -> tuple[str, str]:
    """The path for `model`, and what to say about it."""
    source = find_model(model).source
    if model == DEMO_MODEL or not source.startswith("http"):
        path = model if model == DEMO_MODEL else str(resolve_model(model))
        return path, "The checkpoint has to be at the path `model` on every node."
    return f"/models/{model.lower()}", "Set `model` to the folder of the checkpoint, at the same path on every node."


def _document(plan: ClusterPlan, path: str) -> dict[str, Any]:
    args = _args(plan, path)
    parse_settings(args)  # what is written can be read
    args["layout"]["shards"] = [_Row(shard) for shard in args["layout"]["shards"]]
    application = {
        "name": "switchyard",
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "external_scaler_enabled": True,
        "args": args,
    }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [application],
    }


def _args(plan: ClusterPlan, path: str) -> dict[str, Any]:
    sequences = math.ceil(plan.wishes.concurrency / plan.engines)
    args: dict[str, Any] = {
        "model": path,
        "license": None,
        "engines": plan.engines,
        "layout": _layout(plan.layout),
        "engine": {
            "num_gpus": plan.ranks if plan.on_gpu else 0,
            "max_model_len": plan.wishes.context_tokens,
            "max_num_seqs": sequences,
            "max_num_batched_tokens": max(_BATCHED_TOKENS, sequences),
            # Rounded up, so that the requests that were planned for have room; the tenth that is kept free covers it.
            "kv_cache_gib": math.ceil(plan.kv_bytes_per_rank / _GIB * 1000) / 1000,
        },
    }
    if plan.ranks > 1:
        args["engine"]["vllm"] = {"tensor_parallel_size": plan.ranks}
    return args


def _layout(layout: LayoutSettings) -> dict[str, Any]:
    shards = [
        {
            "layers": list(shard.layers),
            "experts": list(shard.experts),
            "nodes": list(shard.nodes),
            "device": shard.device,
            "replicas": shard.replicas,
            "shadow": shard.shadow,
        }
        for shard in layout.shards
    ]
    return {"engine_nodes": list(layout.engine_nodes), "shards": shards}


class _Row(dict[str, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    """Writes _Row."""


def _write_row(dumper: _Dumper, row: _Row) -> yaml.Node:
    return dumper.represent_mapping("tag:yaml.org,2002:map", row, flow_style=True)


_Dumper.add_representer(_Row, _write_row)
