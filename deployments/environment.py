"""Environment variables: what vLLM's processes are started with, and what a Ray Serve node needs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.config import Settings, TracingSettings
from deployments.cores import omp_binding


def cache_folder() -> Path:
    """Compiled kernels and graphs are kept here between starts: SWITCHYARD_CACHE, or .cache/switchyard at home."""
    configured = os.environ.get("SWITCHYARD_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "switchyard"


def quiet_environment() -> dict[str, str]:
    """Nothing is reported to anybody and nothing is downloaded."""
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def engine_environment(settings: Settings, cores: Sequence[int]) -> dict[str, str]:
    """For the processes of one vLLM engine on this host; what the user has set already wins over these."""
    ranks = int(settings.engine.vllm.get("tensor_parallel_size", 1))
    cache = cache_folder()
    return {
        **quiet_environment(),
        "VLLM_CPU_OMP_THREADS_BIND": omp_binding(cores, ranks),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_LOGGING_LEVEL": "INFO",
        # On CPUs vLLM 0.32 saves ahead-of-time artifacts that it then fails to load, and compiles anew at every start
        # (compilation/decorators.py calls finalize_loading on a plain function); Inductor's own cache works.
        "VLLM_USE_AOT_COMPILE": "0",
        **_tracing_environment(settings.tracing),
    }


def _tracing_environment(tracing: TracingSettings) -> dict[str, str]:
    """Read by OpenTelemetry's SDK in every process of the engine; a request's own traceparent wins over the share."""
    if tracing.endpoint is None:
        return {}
    return {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": {"grpc": "grpc", "http": "http/protobuf"}[tracing.protocol],
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": str(tracing.sample),
        "OTEL_SERVICE_NAME": "switchyard",
    }


def feed_environment(settings: Settings, feed_address: str, folder: Path, engine_id: str) -> dict[str, str]:
    """What turns remote experts on in vLLM's processes; read by model/remote_experts.py. `folder` has the secrets."""
    return {
        "SWITCHYARD_FEED": feed_address,
        "SWITCHYARD_SECRET_FILE": str(folder / "secret"),
        "SWITCHYARD_FEED_SECRET_FILE": str(folder / "feed-secret"),
        "SWITCHYARD_ENGINE_ID": engine_id,
        "SWITCHYARD_METRICS": str(int(settings.metrics)),
        "SWITCHYARD_EXPERT_TIMEOUT_S": str(settings.expert_timeout_s),
        # The engine waits for its workers at its first layer call; those of a large checkpoint take long to load it.
        "SWITCHYARD_START_TIMEOUT_S": str(settings.start_timeout_s),
        # A step whose experts are gone waits for their return, while requests get 503 (deployments/shortage.py).
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(7 * 24 * 3600),
    }


def apply_defaults(variables: Mapping[str, str]) -> None:
    """Set the variables that are not set yet, for this process and those that it will start."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
