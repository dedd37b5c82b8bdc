"""The composition root: what runs, built from the ``args`` mapping of ray-config.yaml.

build_app(args) -> Engine x engines  --handles-->  ExpertRouter  <--  ExpertWorker x workers x replicas
                                                               <--  shadows (an ExpertWorker each), WarmSpare x spares
                     --handle-->  Gatekeeper, where API keys are asked for
"""

import os
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from cluster.config import Settings, to_args
from cluster.layout import node_selector, per_node, replicas_of, shards_of
from cluster.routing import Role
from deployments.engine import Engine
from deployments.expert_router import ExpertRouter
from deployments.expert_worker import ExpertWorker, WarmSpare
from deployments.gatekeeper import Gatekeeper
from deployments.nursery import NURSERY, REPLICA_PYTHON
from deployments.plan import make_plan
from deployments.targets import experts_name

APP_NAME = "switchyard"
ROUTER_NAME = "expert-router"
ENGINE_NAME = "engine"
GATEKEEPER_NAME = "gatekeeper"

# Ray gives the head node this resource (ray/_private/resource_spec.py). The file of API keys is there; and the expert
# router is where Ray and Serve have their own heads, so that no other machine is needed for all of them to work.
_ON_HEAD = {"node:__internal_head__": 0.001}
# Long polls and heartbeats of every worker and engine are calls in progress at the router.
_ROUTER_CALLS = 10_000
# vLLM has its own queue; Serve shall not hold requests back.
_ENGINE_CALLS = 10_000
# A start that failed three times will fail again.
_START_TRIES = 3
_LOAD_EVERY_S = 1.0
# What only answers calls ends this soon, long polls and all; workers and engines first finish what they have taken.
_TELLERS_END_S = 1


def build_app(args: Mapping[str, Any]) -> Application:
    """The Serve application. Raises ConfigError for settings that cannot work."""
    plan = make_plan(args)
    settings, spec = plan.settings, plan.spec
    values = to_args(settings)
    engine_nodes = settings.layout.engine_nodes if settings.layout is not None else ()
    engine = _scaled(
        _deployment(
            Engine, ENGINE_NAME, settings.engines, _gpus(settings.engine.num_gpus), _ENGINE_CALLS, engine_nodes
        ),
        settings,
    )
    gatekeeper = None
    if settings.api_keys is not None:
        gatekeeper = _deployment(Gatekeeper, GATEKEEPER_NAME, 1, 0, _ROUTER_CALLS, resources=_ON_HEAD).bind(values)
    if spec is None:
        return engine.bind(values, None, [], gatekeeper)
    router = _deployment(ExpertRouter, ROUTER_NAME, 1, 0, _ROUTER_CALLS, resources=_ON_HEAD).bind(
        values, spec.fingerprint, spec.num_layers, spec.num_experts, uuid.uuid4().hex
    )
    num_shards = len(shards_of(settings, spec.num_layers, spec.num_experts))
    workers = [
        deployment.bind(values, shard, role, router)
        for shard in range(num_shards)
        for deployment, role in _worker_deployments(settings, shard, num_shards)
    ]
    if settings.spares:
        worker_gpus = _gpus(settings.worker.num_gpus)
        workers.append(
            _deployment(WarmSpare, "spares", settings.spares, worker_gpus, _ROUTER_CALLS).bind(values, router)
        )
    return engine.bind(values, router, workers, gatekeeper)


def _worker_deployments(settings: Settings, shard: int, num_shards: int) -> Iterator[tuple[Any, Role]]:
    """A shard's primaries, and its shadow if it has one."""
    gpus, has_shadow = _gpus(settings.worker.num_gpus), settings.shadow is not None
    nodes: tuple[str, ...] = ()
    shadow_nodes: tuple[str, ...] = ()
    if settings.layout is not None:
        planned = settings.layout.shards[shard]
        gpus, nodes = float(planned.device == "gpu"), planned.nodes
        has_shadow, shadow_nodes = planned.shadow is not None, tuple(filter(None, [planned.shadow]))
    replicas = replicas_of(settings, num_shards)[shard]
    yield _deployment(ExpertWorker, experts_name(shard), replicas, gpus, _ROUTER_CALLS, nodes), Role.PRIMARY
    if has_shadow:
        yield _deployment(ExpertWorker, f"shadow-{shard}", 1, 0, _ROUTER_CALLS, shadow_nodes), Role.SHADOW


def _deployment(
    cls: type,
    name: str,
    num_replicas: int,
    num_gpus: float,
    max_calls: int,
    nodes: tuple[str, ...] = (),
    resources: Mapping[str, float] | None = None,
) -> Any:
    """`nodes`: the only ones that it may run on, with an equal number of replicas on each; () leaves it to Ray."""
    # No logical CPUs are reserved: kernels are bound to cores by deployments/cores.py, and two cores are enough.
    actor_options: dict[str, Any] = {"num_cpus": 0, "num_gpus": num_gpus, "resources": dict(resources or {})}
    if NURSERY in os.environ and not _has_gpu():  # all nodes have one, then: importing vLLM takes a replica ten seconds
        actor_options["runtime_env"] = {"py_executable": REPLICA_PYTHON}
    if nodes:
        actor_options["label_selector"] = node_selector(nodes)
    return serve.deployment(
        cls,
        name=name,
        num_replicas=num_replicas,
        ray_actor_options=actor_options,
        max_replicas_per_node=per_node(num_replicas, nodes),
        max_ongoing_requests=max_calls,
        # A line for every heartbeat would bury everything else; HTTP requests of engines are worth theirs.
        logging_config=LoggingConfig(enable_access_log=name == ENGINE_NAME),
        max_constructor_retry_count=_START_TRIES,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=_TELLERS_END_S if name in (ROUTER_NAME, GATEKEEPER_NAME) else 10,
    )


def _scaled(engine: Any, settings: Settings) -> Any:
    """The deployment of the engines, which Serve scales where the settings allow more or less than `engines`."""
    wanted = settings.autoscaling.engines
    if wanted.max_replicas is None:
        return engine
    return engine.options(
        num_replicas="auto",
        autoscaling_config=AutoscalingConfig(
            min_replicas=wanted.min_replicas,
            initial_replicas=settings.engines,
            max_replicas=wanted.max_replicas,
            target_ongoing_requests=wanted.target_ongoing_requests,
            upscale_delay_s=wanted.upscale_delay_s,
            downscale_delay_s=wanted.downscale_delay_s,
            # Serve's ten seconds would come on top of the delays, for a request that finds no engine too.
            metrics_interval_s=_LOAD_EVERY_S,
        ),
    )


def _gpus(configured: float | None) -> float:
    if configured is not None:
        return configured
    return 1.0 if _has_gpu() else 0.0


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
