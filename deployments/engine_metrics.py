"""An engine's part in a scrape: it answers when the router asks, and asks the router when it is scraped itself.

Nothing is collected while nobody scrapes, but for the counters that are kept anyway.
"""

import asyncio
import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster.energy import EnergyMeter
from deployments.prometheus import families_of

logger = logging.getLogger("ray.serve")

_RETRY_ROUTER_S = 1.0
# Less than Prometheus waits by default (10 s), and more than the router waits for engines (expert_router.py).
_ROUTER_LIMIT_S = 5.0


class EngineMetrics:
    """Of one engine. `ranks` gives the newest Dispatcher.metrics() of its processes, `registry` has vLLM's families."""

    def __init__(
        self, engine_id: str, model: str, ranks: Callable[[], list[dict[str, Any]]], registry: Any, energy: EnergyMeter
    ) -> None:
        self._engine_id = engine_id
        self._model = model
        self._ranks = ranks
        self._registry = registry
        self._energy = energy

    def own(self) -> dict[str, Any]:
        """This engine's part of a snapshot."""
        return {"ranks": self._ranks(), "families": families_of(self._registry), "energy": self._energy.read()}

    async def follow(self, router: DeploymentHandle) -> None:
        """Answer every scrape that the router begins, until cancelled."""
        number = 0
        while True:
            try:
                newest = await router.wait_for_scrape.remote(number)
                if newest != number:
                    await router.engine_metrics.remote(self._engine_id, newest, self.own())
                    number = newest
            # Ray raises many kinds while the router restarts.
            except Exception as error:
                logger.warning("metrics not delivered: %s", error)
                await asyncio.sleep(_RETRY_ROUTER_S)

    async def cluster(self, router: DeploymentHandle | None) -> dict[str, Any]:
        """A snapshot of the whole cluster; of this engine alone where there is no router, or it does not answer."""
        alone = {"version": version(), "model": self._model, "engines": {self._engine_id: self.own()}}
        if router is None:
            return alone
        try:
            snapshot: dict[str, Any] = await asyncio.wait_for(router.scrape.remote(), _ROUTER_LIMIT_S)
        # As above. Whoever watches shall see that the router is gone, and still see this engine.
        except Exception as error:
            logger.warning("the expert router does not answer a scrape: %s", error)
            return {**alone, "status": None}
        return snapshot


def version() -> str:
    """Switchyard's own."""
    return importlib.metadata.version("switchyard")
