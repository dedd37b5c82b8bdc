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
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.config import Settings, parse_settings
from cluster.routing import RoutingTable
from deployments import shared_memory, vllm_app
from deployments.attribution import Attributed
from deployments.cores import allowed_cores, engine_cores
from deployments.environment import apply_defaults, engine_environment, feed_environment
from deployments.http_guard import DisconnectOnCancel, OpenAIErrors
from deployments.models import attribution_of

logger = logging.getLogger("ray.serve")

_RETRY_ROUTER_S = 1.0


class TableLink:
    """Carries routing tables from the router actor to this engine's processes, for as long as the engine lives."""

    def __init__(self, settings: Settings, router: DeploymentHandle, secret: bytes, engine_id: str) -> None:
        from cluster.feed import TableFeed

        self._router = router
        self._folder = Path(tempfile.mkdtemp(prefix="switchyard-"))  # mode 0700
        secret_file = self._folder / "secret"
        secret_file.touch(mode=0o600)
        secret_file.write_bytes(secret)
        self._feed = TableFeed(secret)
        os.environ.update(feed_environment(settings, self._feed.address, secret_file, engine_id))
        self.task = asyncio.create_task(self._follow())

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

    def close(self) -> None:
        self.task.cancel()
        self._feed.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class EngineReplica:
    """The ingress deployment. Serve mounts what __serve_build_asgi_app__ returns."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: dict[str, Any], router: DeploymentHandle | None, workers: list[DeploymentHandle]
    ) -> None:
        settings = parse_settings(args)
        self._engine: Any = None
        self._shared_memory: frozenset[str] = frozenset()
        self._link: TableLink | None = None
        self._router = router
        self._attribution = attribution_of(settings.model)
        self._id = f"engine-{uuid.uuid4().hex[:8]}"
        apply_defaults(engine_environment(settings, engine_cores(settings, allowed_cores())))
        if router is not None:
            self._link = TableLink(settings, router, await router.secret.remote(), self._id)
        self._report("starting vLLM: loading weights, compiling")
        self._namespace = await asyncio.to_thread(_parse, settings, router is not None)
        self._engine = await asyncio.to_thread(vllm_app.start_engine, self._namespace)
        self._report("warming up")
        await vllm_app.warm_up(self._engine)
        self._shared_memory = shared_memory.mapped_by_descendants()

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        app = await vllm_app.build_openai_app(self._namespace, self._engine)
        self._report("ready")
        app = Attributed(OpenAIErrors(app, lambda: bool(self._engine.errored)), self._attribution)
        return DisconnectOnCancel(app)

    async def check_health(self) -> None:
        """Serve restarts the replica when this raises: a dead engine never comes back by itself."""
        await self._engine.check_health()
        if self._link is not None and self._link.task.done():
            raise RuntimeError(f"{self._id}: the routing table is no longer followed")

    async def __del__(self) -> None:
        """Serve calls this once at the end of a graceful stop."""
        if self._engine is not None:
            with contextlib.suppress(Exception):
                await asyncio.to_thread(self._engine.shutdown)
            shared_memory.remove(self._shared_memory)
        if self._link is not None:
            self._link.close()

    def _report(self, stage: str) -> None:
        logger.info("%s: %s", self._id, stage)
        if self._router is not None:
            self._router.report.remote(self._id, stage)


def _parse(settings: Settings, remote_experts: bool) -> Any:
    import psutil
    import torch

    size = vllm_app.kv_cache_bytes(settings, psutil.virtual_memory().available, torch.cuda.is_available())
    return vllm_app.parse_arguments(
        vllm_app.engine_arguments(settings, remote_experts=remote_experts, kv_cache_bytes=size)
    )


Engine = serve.ingress()(EngineReplica)
