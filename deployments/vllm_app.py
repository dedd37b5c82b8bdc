"""vLLM's engine and its own OpenAI app, started inside a Serve replica. The only module here that knows vLLM's insides.

vLLM is imported late, inside functions: its import takes seconds and reads the environment that the replica sets first.
"""

import contextlib
import difflib
import uuid
from argparse import Namespace
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from types import SimpleNamespace
from typing import Any

import psutil
from starlette.types import ASGIApp

from cluster.config import Settings
from cluster.errors import ConfigError
from model.nursery_client import TITLE, NurseryFailed, forks_of
from model.quantised import engine_args
from model.tokenizer_files import tokenizer_args

_GIB = 1 << 30
# Arguments of vLLM that are settings of their own; args.engine.vllm may not contradict them.
_OWN = {
    "model": "model",
    "served_model_name": "served_model_name",
    "dtype": "dtype",
    "max_model_len": "engine.max_model_len",
    "max_num_seqs": "engine.max_num_seqs",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "kv_cache_memory_bytes": "engine.kv_cache_gib",
    "enforce_eager": "engine.enforce_eager",
    "enable_log_requests": "engine.log_prompts",
    "disable_log_stats": "metrics",
    "otlp_traces_endpoint": "tracing.endpoint",
    "host": "http_options.host",
    "port": "http_options.port",
}


def engine_arguments(
    settings: Settings, *, remote_experts: bool, kv_cache_bytes: int | None, on_gpu: bool
) -> dict[str, Any]:
    """vLLM's arguments by their Python names. kv_cache_bytes None leaves the KV cache's size to vLLM.

    Raises ConfigError for arguments of engine.vllm that cannot be.
    """
    clash = sorted(set(settings.engine.vllm) & set(_OWN))
    if clash:
        raise ConfigError(f"engine.vllm.{clash[0]}: set {_OWN[clash[0]]} instead.")
    engine = settings.engine
    arguments: dict[str, Any] = {
        "model": settings.model,
        "served_model_name": [settings.name],
        "dtype": settings.dtype,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "enforce_eager": engine.enforce_eager,
        "enable_log_requests": engine.log_prompts,
        "disable_log_stats": not settings.metrics,
        "disable_uvicorn_access_log": True,
    }
    if engine.max_model_len is not None:
        arguments["max_model_len"] = engine.max_model_len
    if settings.tracing.endpoint is not None:
        arguments["otlp_traces_endpoint"] = settings.tracing.endpoint
    if kv_cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes
    if remote_experts:
        from model.partial_loading import DENSE_LOAD_FORMAT

        arguments |= engine_args(settings.model)
        arguments["load_format"] = DENSE_LOAD_FORMAT
        arguments["worker_extension_cls"] = "model.remote_experts.LayerCallStats"
    arguments = {**arguments, **tokenizer_args(settings.model), **engine.vllm}
    if remote_experts and on_gpu and not engine.enforce_eager:
        from model.cuda_graphs import around_moe_layers

        arguments["compilation_config"] = around_moe_layers(arguments.get("compilation_config", {}), settings.model)
    return arguments


def parse_arguments(arguments: dict[str, Any]) -> Namespace:
    """The namespace that vLLM's server would have parsed from its command line. Unknown names raise ConfigError."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    namespace: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    for name, value in arguments.items():
        if not hasattr(namespace, name):
            near = difflib.get_close_matches(name, vars(namespace), n=1, cutoff=0.0)[0]
            raise ConfigError(f"engine.vllm.{name}: vLLM has no such argument. The nearest is {near}.")
        setattr(namespace, name, value)
    return namespace


def engine_processes(replica_pid: int | None = None) -> list[psutil.Process]:
    """EngineCore, first, and its workers, of the engine that this process, or that replica, has started.

    They are its children and grandchildren, or the nursery's in their place (model/forked_process.py). vLLM titles them
    "VLLM::..", but not always: setproctitle finds no room for a title where the first variable of the environment was
    changed before, and Ray starts its workers with variables in any order.
    """
    nurseries = _nurseries()
    found: list[psutil.Process] = []
    parents = [psutil.Process(replica_pid)]
    while parents:
        parents = [child for parent in parents for child in _started_by(parent, nurseries)]
        found += parents
    return found


def _started_by(parent: psutil.Process, nurseries: Iterable[str]) -> list[psutil.Process]:
    forks: list[int] = []
    for name in nurseries:
        with contextlib.suppress(NurseryFailed):  # another cluster's: our own has just started what we look for
            forks += forks_of(name, parent.pid)
    found = []
    for pid in (*(child.pid for child in parent.children()), *forks):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                found.append(process)
    return found


def _nurseries() -> set[str]:
    """Names of the nurseries on this machine."""
    titles = (" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    return {title.removeprefix(TITLE).strip() for title in titles if title.startswith(TITLE)}


def is_alive(process: psutil.Process) -> bool:
    """Whether it has not ended; one that has, and that nobody has waited for, has."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def start_engine(namespace: Namespace) -> Any:
    """A deployments.vllm_engine.Engine, loaded and ready to compute. Blocks for that time; needs no event loop."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from deployments.vllm_engine import Engine

    engine_args = AsyncEngineArgs.from_cli_args(namespace)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    return Engine.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        disable_log_stats=engine_args.disable_log_stats,
    )


async def build_openai_app(namespace: Namespace, engine: Any) -> ASGIApp:
    """vLLM's OpenAI app around the engine, as its own server would mount it."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await engine.get_supported_tasks()
    app = build_app(namespace, tasks, engine.model_config)
    await init_app_state(engine, app.state, namespace, tasks)
    # vLLM's handlers ask their server to exit when the engine is dead; here Serve's health check does that.
    app.state.server = SimpleNamespace(should_exit=False)
    if namespace.worker_extension_cls:
        app.add_api_route("/switchyard/stats", _layer_call_stats_of(engine), methods=["GET"])
    return app


def metrics_registry() -> Any:
    """The prometheus_client registry that has vLLM's metrics of this process."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return get_prometheus_registry()


def _layer_call_stats_of(engine: Any) -> Callable[[], Awaitable[dict[str, int]]]:
    async def layer_call_stats() -> dict[str, int]:
        """The dispatchers' counters, added up over the engine's ranks; names as in Dispatcher.stats()."""
        total: Counter[str] = Counter()
        for rank in await engine.collective_rpc("layer_call_stats"):
            total.update(rank)
        return dict(total)

    return layer_call_stats


async def warm_up(engine: Any) -> None:
    """Run the paths whose first use compiles: greedy, sampled, with logprobs of prompt and answer."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": [1, 2, 3, 4]}
    detokenize = engine.renderer.tokenizer is not None
    for options in (
        {"temperature": 0.0, "logprobs": 1, "prompt_logprobs": 1},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 1},
        {"temperature": 1.0},
    ):
        parameters = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=detokenize, **options)
        async for _ in engine.generate(prompt, parameters, request_id=f"warm-up-{uuid.uuid4().hex}"):
            pass


def kv_cache_bytes(settings: Settings, available_bytes: int, on_gpu: bool) -> int | None:
    """Bytes of the KV cache: the setting; else 1 GiB on a CPU, at most a quarter of what is free; else vLLM decides."""
    if settings.engine.kv_cache_gib is not None:
        return int(settings.engine.kv_cache_gib * _GIB)
    return None if on_gpu else min(_GIB, available_bytes // 4)
