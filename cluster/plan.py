"""A routing table made ready for the hot path: per layer, which shard and which local index each expert has.

T tokens, K top_k, E experts, D hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Collection

import numpy as np

from cluster.blame import Latency
from cluster.errors import InvalidCall
from cluster.routing import RoutingTable, Shard
from cluster.transport import Link


class Route:
    """A shard and the live links to its ONLINE replicas, in the order in which they are asked.

    links: primaries that are above suspicion. shadows: the same of shadow replicas. suspects: all others.
    """

    __slots__ = ("global_ids", "latency", "links", "num_unsuspecting", "shadows", "shard", "suspects")

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.links: list[Link] = []
        self.shadows: list[Link] = []
        self.suspects: list[Link] = []
        self.latency = Latency()
        self.num_unsuspecting = 0  # how often suspicion was ignored because there was nobody else
        self.global_ids = np.array([*shard.experts, -1], np.int32)  # by local id; -1 stays -1

    def choose(self, avoid: Collection[Link] = ()) -> Link | None:
        """A link with an idle slot, or None: of two drawn at random, the one with fewer outstanding tokens.

        Shadows are asked where no primary can be, suspects where nobody else can be.
        """
        links = self.links
        if len(links) == 1 and not avoid and links[0].free:
            return links[0]
        able = _able(links, avoid) or _able(self.shadows, avoid)
        if not able and self.suspects:
            able = _able(self.suspects, avoid)
            self.num_unsuspecting += bool(able)
        return _lighter([link for link in able if link.free])

    def all(self) -> list[Link]:
        return [*self.links, *self.shadows, *self.suspects]


def _able(links: list[Link], avoid: Collection[Link]) -> list[Link]:
    """Those that can take a call now or will as soon as one is answered in time."""
    return [link for link in links if link not in avoid and (link.free or not link.is_stuck)]


def _lighter(links: list[Link]) -> Link | None:
    if len(links) < 2:
        return links[0] if links else None
    first = int(random.random() * len(links))
    second = (first + 1 + int(random.random() * (len(links) - 1))) % len(links)
    a, b = links[first], links[second]
    return a if a.outstanding_tokens <= b.outstanding_tokens else b


class LayerPlan:
    """Look-up arrays of one layer. `whole` is the only route when one shard holds every expert in order."""

    __slots__ = ("local_of", "num_experts", "routes", "whole")

    def __init__(self, routes: tuple[Route, ...], num_experts: int) -> None:
        self.routes = routes
        self.num_experts = num_experts
        self.local_of = np.full((len(routes), num_experts + 1), -1, np.int32)  # the last column answers id -1: nowhere
        for i, route in enumerate(routes):
            self.local_of[i, list(route.shard.experts)] = np.arange(len(route.shard.experts))
        alone = len(routes) == 1 and routes[0].shard.experts == tuple(range(num_experts))
        self.whole = routes[0] if alone else None

    def split(self, ids_TK: np.ndarray) -> list[tuple[Route, np.ndarray | None, np.ndarray]]:
        """Which tokens go where: (route, row indices or None for all rows, local ids of those rows [t, K] i32).

        An id of -1 goes nowhere. Raises InvalidCall for an id outside [-1, E).
        """
        check_global_ids(ids_TK, self.num_experts)
        if self.whole is not None:  # all rows, also those without a choice: their zeros come from the worker
            return [(self.whole, None, ids_TK.astype(np.int32))]
        num_tokens = len(ids_TK)
        pieces: list[tuple[Route, np.ndarray | None, np.ndarray]] = []
        for route, local_of in zip(self.routes, self.local_of, strict=True):
            local_TK = local_of.take(ids_TK)
            rows = (local_TK.max(axis=1) >= 0).nonzero()[0]
            if len(rows) == num_tokens:
                pieces.append((route, None, local_TK))
            elif len(rows):
                pieces.append((route, rows, local_TK.take(rows, axis=0)))
        return pieces


def check_global_ids(ids_TK: np.ndarray, num_experts: int) -> None:
    """Raise InvalidCall unless every id is in [-1, num_experts)."""
    if ids_TK.min() < -1 or ids_TK.max() >= num_experts:
        raise InvalidCall(f"expert ids span [{ids_TK.min()}, {ids_TK.max()}], the model has {num_experts} experts")


class Plan:
    """A table with its routes and layers. Layers that are served by the same shards share one LayerPlan.

    What the plan before it has learnt about the speed of equal shards is kept.
    """

    def __init__(self, table: RoutingTable, before: Plan | None = None) -> None:
        self.table = table
        self.routes = {s.shard_id: Route(s) for s in table.shards}
        learnt = {route.shard: route.latency for route in before.routes.values()} if before else {}
        for route in self.routes.values():
            route.latency = learnt.get(route.shard, route.latency)
        made: dict[tuple[int, ...], LayerPlan] = {}
        self.layers: list[LayerPlan] = []
        for layer in range(table.num_layers):
            key = tuple(s.shard_id for s in table.shards if s.first_layer <= layer < s.end_layer)
            if key not in made:
                made[key] = LayerPlan(tuple(self.routes[k] for k in key), table.num_experts)
            self.layers.append(made[key])

    def find(self, layer: int, experts: tuple[int, ...]) -> Route | None:
        """The route that serves exactly these experts of a layer, if the table still has one."""
        return next((r for r in self.layers[layer].routes if r.shard.experts == experts), None)
