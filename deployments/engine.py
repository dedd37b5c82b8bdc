"""An engine: vLLM and its OpenAI app in a Serve replica, linked to the expert workers by the routing table.

The engine starts while the workers load; its first forward step waits for the first complete table. It is announced to
Serve, and so gets requests, only after a warm-up that went through the workers.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.blame import Cause
from cluster.config import Settings, parse_settings
from cluster.rotation import SECRET_BYTES, Secrets
from cluster.routing import RoutingTable
from deployments import shared_memory, vllm_app
from deployments.attribution import Attributed
from deployments.cores import allowed_cores, engine_cores
from deployments.energy import meter_of
from deployments.engine_load import engine_load
from deployments.engine_metrics import EngineMetrics
from deployments.environment import apply_defaults, engine_environment, feed_environment
from deployments.http_guard import OpenAIErrors
from deployments.key_guard import Authorised, Gate
from deployments.models import attribution_of
from deployments.open_requests import OpenRequests
from deployments.privacy import Private, forbid_core_dumps
from deployments.prometheus import ClusterMetrics
from deployments.shortage import EndInShortage, Shortage
from deployments.tracing import Traced

logger = logging.getLogger("ray.serve")

_RETRY_ROUTER_S = 1.0
_HEARTBEAT_EVERY_S = 1.0
_LOOK_EVERY_S = 0.25
_LAST_WORDS_S = 1.0
_QUIET_S = 0.1
_QUIET_LIMIT_S = 5.0


class TableLink:
    """Carries routing tables from the router actor to this engine's processes, for as long as the engine lives."""

    def __init__(
        self, settings: Settings, router: DeploymentHandle, secrets: Secrets, engine_id: str, shortage: Shortage
    ) -> None:
        from cluster.feed import TableFeed

        self._router = router
        self._folder = Path(tempfile.mkdtemp(prefix="switchyard-"))  # mode 0700
        self._secrets = secrets
        self._write("secret", secrets.proven)
        feed_secret = os.urandom(SECRET_BYTES)  # for this engine's own processes, and so never changed
        self._write("feed-secret", feed_secret)
        self._engine_id = engine_id
        self._shortage = shortage
        self._loop = asyncio.get_running_loop()
        self.state = "starting"
        self.find_fault: Callable[[], Awaitable[str]] | None = None  # what check_integrity() finds in the engine
        self._checked = 0
        self._feed = TableFeed(feed_secret, on_stalled=shortage.set, on_accused=self._on_accused)
        os.environ.update(feed_environment(settings, self._feed.address, self._folder, engine_id))
        self.tasks = [asyncio.create_task(each) for each in self._duties()]

    def _duties(self) -> tuple[Coroutine[Any, Any, None], ...]:
        return self._follow(), self._follow_secrets(), self._send_heartbeats()

    def _write(self, name: str, secret: bytes) -> None:
        """In one step: the engine's processes read the file whenever they connect."""
        fresh = self._folder / f"{name}.new"
        fresh.touch(mode=0o600)
        fresh.write_bytes(secret)
        fresh.replace(self._folder / name)

    def _on_accused(self, replica_id: str, cause: Cause) -> None:
        """In the feed's thread."""

        def tell() -> None:
            self._router.accused.remote(self._engine_id, replica_id, cause.value)

        self._loop.call_soon_threadsafe(tell)

    async def _send_heartbeats(self) -> None:
        pid, node = os.getpid(), ray.get_runtime_context().get_node_id()
        while True:
            state = "stalled" if self._shortage.is_on else self.state
            # Ray raises many kinds while the router restarts; the next beat tells it.
            with contextlib.suppress(Exception):
                number = await self._router.engine_heartbeat.remote(self._engine_id, pid, node, state, engine_load())
                if number != self._checked and self.find_fault is not None:
                    await self._router.engine_checked.remote(self._engine_id, number, await self.find_fault())
                    self._checked = number
            await asyncio.sleep(_HEARTBEAT_EVERY_S)

    async def _follow_secrets(self) -> None:
        while True:
            try:
                news = await self._router.next_secrets.remote(self._engine_id, self._secrets.serial)
            # Ray raises many kinds while the router restarts.
            except Exception as error:
                logger.warning("no news of the secret: %s", error)
                await asyncio.sleep(_RETRY_ROUTER_S)
                continue
            if news is not None:
                self._write("secret", news.proven)
                self._secrets = news

    async def _follow(self) -> None:
        known_epoch = 0
        while True:
            try:
                table = await self._router.wait_for_table.remote(known_epoch)
            # Ray raises many kinds while the router restarts; tables stay as they are until it is back.
            except Exception as error:
                logger.warning("no news from the expert router: %s", error)
                await asyncio.sleep(_RETRY_ROUTER_S)
                continue
            if table is not None:
                known_epoch = table["epoch"]
                self._feed.publish(RoutingTable.from_json(table))

    def metrics(self) -> list[dict[str, Any]]:
        """The newest Dispatcher.metrics() of every process of this engine that makes layer calls."""
        return self._feed.metrics()

    def answer_scrapes(self, metrics: EngineMetrics) -> None:
        """From now on, for as long as the engine lives."""
        self.tasks.append(asyncio.create_task(metrics.follow(self._router)))

    @property
    def is_broken(self) -> bool:
        return any(task.done() for task in self.tasks)

    def close(self, why: str, *, is_lost: bool) -> None:
        for task in self.tasks:
            task.cancel()
        self._router.engine_left.remote(self._engine_id, why, is_lost)
        self._feed.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class EngineReplica:
    """The ingress deployment. Serve mounts what __serve_build_asgi_app__ returns."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        args: dict[str, Any],
        router: DeploymentHandle | None,
        workers: list[DeploymentHandle],
        gatekeeper: DeploymentHandle | None,
    ) -> None:
        settings = parse_settings(args)
        if not settings.engine.log_prompts:
            forbid_core_dumps()
        self._engine: Any = None
        self._shared_memory: frozenset[str] = frozenset()
        self._link: TableLink | None = None
        self._open_requests: OpenRequests | None = None
        self._ending: asyncio.Task[None] | None = None
        self._router = router
        self._attribution = attribution_of(settings.model)
        self._shortage = Shortage(asyncio.get_running_loop())
        self._id = f"engine-{uuid.uuid4().hex[:8]}"
        self._gate = Gate(gatekeeper, self._id, settings.most_engines) if gatekeeper is not None else None
        apply_defaults(engine_environment(settings, engine_cores(settings, allowed_cores())))
        if router is not None:
            self._link = TableLink(settings, router, await router.secrets.remote(), self._id, self._shortage)
        self._report("starting vLLM: loading weights, compiling")
        self._namespace = await asyncio.to_thread(_parse, settings, router is not None)
        self._engine = await asyncio.to_thread(vllm_app.start_engine, self._namespace)
        self._report("warming up")
        await vllm_app.warm_up(self._engine)
        self._is_traced = settings.tracing.endpoint is not None
        if self._is_traced and router is not None:
            await self._engine.collective_rpc("trace_layer_calls")
        self._processes = vllm_app.engine_processes()
        self._shared_memory = shared_memory.mapped_by(self._processes)
        self._metrics = self._start_metrics(settings) if settings.metrics else None
        self._ending = asyncio.create_task(self._end_when_dead())

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        app = await vllm_app.build_openai_app(self._namespace, self._engine)
        self._report("ready")
        if self._link is not None:
            self._link.state = "ready"
            self._link.find_fault = self._find_fault
        app = EndInShortage(OpenAIErrors(app, lambda: bool(self._engine.errored)), self._shortage)
        app = ClusterMetrics(app, self._snapshot)
        if self._gate is not None:
            app = Authorised(app, self._gate)
        app = Attributed(Private(app), self._attribution)
        if self._is_traced:
            app = Traced(app)
        self._open_requests = OpenRequests(app)
        return self._open_requests

    def _start_metrics(self, settings: Settings) -> EngineMetrics:
        processes = [psutil.Process(), *self._processes]
        ranks = self._link.metrics if self._link is not None else list
        energy = meter_of(processes, settings.engine.num_gpus)
        metrics = EngineMetrics(self._id, settings.name, ranks, vllm_app.metrics_registry(), energy)
        if self._link is not None:
            self._link.answer_scrapes(metrics)
        return metrics

    async def _snapshot(self) -> dict[str, Any] | None:
        """For /metrics; None when metrics are off."""
        return await self._metrics.cluster(self._router) if self._metrics is not None else None

    async def _find_fault(self) -> str:
        return "; ".join(filter(None, await self._engine.collective_rpc("layer_call_fault")))

    async def _end_when_dead(self) -> None:
        """A dead engine never comes back: end, so that Serve starts another, once its requests have their errors.

        vLLM takes several seconds to notice that one of its workers has died, so its processes are watched here.
        """
        while not self._engine.errored and all(map(vllm_app.is_alive, self._processes)):
            await asyncio.sleep(_LOOK_EVERY_S)
        logger.error("%s: vLLM's engine is dead; the replica ends", self._id)
        self._engine.fail_open_requests()
        if self._link is not None:
            self._link.close("vLLM's engine is dead", is_lost=True)
        await asyncio.sleep(_LAST_WORDS_S)
        # Until Serve has noticed, requests still come here; each of them gets its answer.
        if self._open_requests is not None:
            await self._open_requests.wait_for_quiet(_QUIET_S, _QUIET_LIMIT_S)
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shared_memory.remove(self._shared_memory)
        os._exit(1)

    async def check_health(self) -> None:
        """Serve restarts the replica when this raises: a dead engine never comes back by itself."""
        await self._engine.check_health()
        if self._link is not None and self._link.is_broken:
            raise RuntimeError(f"{self._id}: the routing table is no longer followed")
        if self._gate is not None and self._gate.is_broken:
            raise RuntimeError(f"{self._id}: the API keys are no longer followed")

    async def __del__(self) -> None:
        """Serve calls this once at the end of a graceful stop."""
        if self._ending is not None:
            self._ending.cancel()  # its processes end now because they are told to
        if self._engine is not None:
            with contextlib.suppress(Exception):
                await asyncio.to_thread(self._engine.shutdown)
            shared_memory.remove(self._shared_memory)
        if self._gate is not None:
            self._gate.close()
        if self._link is not None:
            self._link.close("stopped", is_lost=False)

    def _report(self, stage: str) -> None:
        logger.info("%s: %s", self._id, stage)
        if self._router is not None:
            self._router.report.remote(self._id, stage)


def _parse(settings: Settings, remote_experts: bool) -> Any:
    import torch

    on_gpu = torch.cuda.is_available()
    size = vllm_app.kv_cache_bytes(settings, psutil.virtual_memory().available, on_gpu)
    return vllm_app.parse_arguments(
        vllm_app.engine_arguments(settings, remote_experts=remote_experts, kv_cache_bytes=size, on_gpu=on_gpu)
    )


Engine = serve.ingress()(EngineReplica)
