"""A cluster on paper: every layer call of every engine as an event, with queues at the workers and nodes that vanish.

What is simulated is what the data plane does (README.md, "A request, in eight steps"): an engine goes through the MoE
layers of a step one after the other; each layer's tokens go to the workers of their experts; a worker takes everything
that waits for the same layer; of two replicas the one with fewer outstanding tokens is asked; calls of a lost worker go
to another replica once the loss is noticed, or wait for one. Prompts are computed in chunks beside decoding requests.

Kernels take roofline time at the rates that they were measured to reach; everything else comes from `Costs` too.
Deterministic for a seed.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from cluster.inventory import Chip
from cluster.roofline import CallCost, EngineLoad, ModelFacts, dense_seconds
from cluster.simulated import Outcome, Recorder
from cluster.workload import Workload

_T = TypeVar("_T")
_ACTIVATION_BYTES = 2
_MANY_TOKENS = 64


@dataclass(frozen=True)
class Costs:
    """Measured: ops/bench/constants.yaml says how. Seconds, but for the efficiency."""

    call: CallCost
    step_s: float
    """Of an engine's step beside its kernels: scheduling, sampling, HTTP."""
    step_request_s: float
    """Of that, for each request in the step."""
    message_s: float
    """Of a layer call for each worker after the first."""
    read_efficiency: float
    """What kernels reach of a device's memory bandwidth."""
    arithmetic_efficiency: float
    """What they reach of its peak arithmetic rate."""
    notice_s: float
    """From a node's loss to its calls being sent elsewhere."""

    def reached(self, chip: Chip) -> Chip:
        """The chip with the rates that kernels reach."""
        return chip.reaching(self.read_efficiency, self.arithmetic_efficiency)


@dataclass(frozen=True)
class SimShard:
    """Experts [first_expert, end_expert) of layers [first_layer, end_layer); workers: each replica's node and chip."""

    first_layer: int
    end_layer: int
    first_expert: int
    end_expert: int
    workers: tuple[tuple[str, Chip], ...]


@dataclass(frozen=True)
class SimCluster:
    """What is simulated. engine_nodes: one for each engine."""

    model: ModelFacts
    engine_nodes: tuple[str, ...]
    engine: EngineLoad
    shards: tuple[SimShard, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    network_bytes_s: float
    network_latency_s: float


@dataclass
class _Request:
    sent_s: float
    prompt_left: int
    output_left: int
    cached: int = 0
    last_s: float = 0.0


@dataclass
class _Call:
    """The tokens of one engine for one shard, in one layer."""

    engine: _Engine
    shard: int
    layer: int
    pairs: int
    distinct: int
    tokens: int
    generation: int


@dataclass
class _Worker:
    node: str
    chip: Chip
    waiting: deque[_Call] = field(default_factory=deque)
    serving: list[_Call] = field(default_factory=list)
    outstanding: int = 0
    is_alive: bool = True
    generation: int = 0
    busy_s: float = 0.0


@dataclass
class _Engine:
    node: str
    running: list[_Request] = field(default_factory=list)
    waiting: deque[_Request] = field(default_factory=deque)
    chunks: list[tuple[_Request, int]] = field(default_factory=list)
    tokens: int = 0
    layer: int = 0
    layer_s: float = 0.0
    pending: int = 0
    reply_s: float = 0.0
    is_busy: bool = False
    is_alive: bool = True
    generation: int = 0

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting)


def simulate(
    cluster: SimCluster, load: Workload, costs: Costs, progress: Callable[[float], None] = lambda now_s: None
) -> Outcome:
    """Run the load to its end. `progress` hears the simulated time now and then."""
    return _Simulation(_at_measured_rates(cluster, costs), load, costs).run(progress)


def _at_measured_rates(cluster: SimCluster, costs: Costs) -> SimCluster:
    shards = tuple(
        replace(shard, workers=tuple((node, costs.reached(chip)) for node, chip in shard.workers))
        for shard in cluster.shards
    )
    return replace(cluster, engine=replace(cluster.engine, chip=costs.reached(cluster.engine.chip)), shards=shards)


class _Simulation:
    def __init__(self, cluster: SimCluster, load: Workload, costs: Costs) -> None:
        self._cluster, self._load, self._costs = cluster, load, costs
        self._random = np.random.default_rng(load.seed)
        self._draw = random.Random(load.seed).random  # many times faster than numpy's for one number
        self._engines = [_Engine(node) for node in cluster.engine_nodes]
        self._workers = [[_Worker(node, chip) for node, chip in shard.workers] for shard in cluster.shards]
        self._parked: list[list[_Call]] = [[] for _ in cluster.shards]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now_s = 0.0
        self._record = Recorder(load)
        self._by_layer = [_shards_of_layer(cluster.shards, layer) for layer in range(cluster.model.num_moe_layers)]
        self._popularity = _popularity(cluster.model, load.expert_skew, self._random)

    def run(self, progress: Callable[[float], None]) -> Outcome:
        for _ in range(self._load.streams):
            self._at(0.0, self._send)
        if self._load.requests_per_s:
            self._at(0.0, self._arrive)
        for loss in self._load.losses:
            self._at(loss.at_s, lambda node=loss.node: self._lose(node))  # type: ignore[misc]
            if math.isfinite(loss.back_after_s):
                self._at(loss.at_s + loss.back_after_s, lambda node=loss.node: self._bring_back(node))  # type: ignore[misc]
        next_s = 0.0
        while self._events and self._events[0][0] <= self._load.duration_s:
            self._now_s, _, action = heapq.heappop(self._events)
            action()
            if self._now_s >= next_s:
                progress(self._now_s)
                next_s = self._now_s + self._load.duration_s / 100
        return self._record.outcome([[worker.busy_s for worker in replicas] for replicas in self._workers])

    def _at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), action))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        """Poisson arrivals."""
        self._send()
        self._at(self._now_s + float(self._random.exponential(1 / self._load.requests_per_s)), self._arrive)

    def _send(self) -> None:
        """To the less loaded of two engines, as Serve's router does."""
        alive = [engine for engine in self._engines if engine.is_alive]
        if not alive:
            self._record.fail()
            self._at(self._now_s + 1.0, self._send_again)
            return
        engine = min(self._two_of(alive), key=lambda each: each.load)
        engine.waiting.append(_Request(self._now_s, self._load.prompt_tokens, self._load.output_tokens))
        if not engine.is_busy:
            self._begin_step(engine)

    def _send_again(self) -> None:
        """A stream whose request has ended asks anew; open arrivals come by themselves."""
        if self._load.streams:
            self._send()

    def _two_of(self, things: Sequence[_T]) -> tuple[_T, _T]:
        """Drawn at random; they may be the same."""
        draw = self._draw
        return things[int(draw() * len(things))], things[int(draw() * len(things))]

    # -- an engine's step ---------------------------------------------------------------------------------------------

    def _begin_step(self, engine: _Engine) -> None:
        cluster, costs = self._cluster, self._costs
        while engine.waiting and len(engine.running) < cluster.max_num_seqs:
            engine.running.append(engine.waiting.popleft())
        engine.chunks = list(_chunks(engine.running, cluster.max_num_batched_tokens))
        engine.tokens = sum(count for _, count in engine.chunks)
        engine.is_busy = engine.tokens > 0
        if not engine.is_busy:
            return
        cached = sum(request.cached for request in engine.running)
        kernels_s = dense_seconds(cluster.model, cluster.engine, engine.tokens, cached)
        beside_s = costs.step_s + costs.step_request_s * len(engine.chunks)
        engine.layer, engine.layer_s = 0, kernels_s / cluster.model.num_moe_layers
        self._at(self._now_s + beside_s + engine.layer_s, self._guarded(engine, self._call_layer))

    def _guarded(self, engine: _Engine, action: Callable[[_Engine], None]) -> Callable[[], None]:
        """Nothing happens if the engine has died meanwhile."""
        generation = engine.generation

        def act() -> None:
            if engine.generation == generation:
                action(engine)

        return act

    def _call_layer(self, engine: _Engine) -> None:
        """Attention of this layer is done: send its tokens to the workers."""
        costs = self._costs
        counts_E = self._choices(engine.tokens, engine.layer)
        calls = []
        for shard in self._by_layer[engine.layer]:
            held = self._cluster.shards[shard]
            here_E = counts_E[held.first_expert : held.end_expert]
            pairs = sum(here_E)
            if pairs:
                distinct = len(here_E) - here_E.count(0)
                tokens = min(engine.tokens, pairs)
                calls.append(_Call(engine, shard, engine.layer, pairs, distinct, tokens, engine.generation))
        engine.pending, engine.reply_s = len(calls), self._now_s
        cost_s = costs.call.call_s + costs.call.token_s * engine.tokens + costs.message_s * (len(calls) - 1)
        for call in calls:
            self._ask(call, self._now_s + cost_s)

    def _choices(self, tokens: int, layer: int) -> list[int]:
        """How many of so many tokens choose each expert: top_k different ones each, or about so where they are many."""
        popularity_E, top_k = self._popularity[layer], self._cluster.model.top_k
        if tokens > _MANY_TOKENS:
            return list(self._random.multinomial(tokens * top_k, popularity_E).tolist())
        # The largest of log p plus Gumbel noise are a draw without replacement (Vieira 2014, "Gumbel-max trick").
        keys_TE = np.log(popularity_E) + self._random.gumbel(size=(tokens, len(popularity_E)))
        chosen_TK = np.argpartition(keys_TE, -top_k, axis=1)[:, -top_k:]
        return list(np.bincount(chosen_TK.ravel(), minlength=len(popularity_E)).tolist())

    def _ask(self, call: _Call, sent_s: float) -> None:
        """Send a call to the better of two replicas; keep it while the shard has none."""
        alive = [worker for worker in self._workers[call.shard] if worker.is_alive]
        if not alive:
            self._parked[call.shard].append(call)
            return
        worker = alive[0]
        if len(alive) > 1:
            worker = min(self._two_of(alive), key=lambda each: each.outstanding)
        worker.outstanding += call.tokens
        arrives_s = sent_s + self._wire_s(call, worker)
        generation = worker.generation

        def arrive() -> None:
            if worker.generation != generation:
                self._at(self._now_s + self._costs.notice_s, lambda: self._ask(call, self._now_s))
                return
            worker.waiting.append(call)
            if not worker.serving:
                self._serve(worker)

        self._at(arrives_s, arrive)

    def _wire_s(self, call: _Call, worker: _Worker) -> float:
        if worker.node == call.engine.node:
            return 0.0
        size = call.tokens * self._cluster.model.hidden_size * _ACTIVATION_BYTES
        return self._cluster.network_latency_s + size / self._cluster.network_bytes_s

    def _serve(self, worker: _Worker) -> None:
        """Take everything that waits for the layer of the oldest call."""
        layer = worker.waiting[0].layer
        worker.serving = [call for call in worker.waiting if call.layer == layer]
        worker.waiting = deque(call for call in worker.waiting if call.layer != layer)
        seconds = self._kernel_s(worker.chip, worker.serving)
        worker.busy_s += seconds
        generation = worker.generation

        def done() -> None:
            if worker.generation == generation:
                self._answer(worker)

        self._at(self._now_s + seconds, done)

    def _kernel_s(self, chip: Chip, calls: Sequence[_Call]) -> float:
        model = self._cluster.model
        held = self._cluster.shards[calls[0].shard]
        distinct = min(held.end_expert - held.first_expert, sum(call.distinct for call in calls))
        pairs = sum(call.pairs for call in calls)
        read_s = distinct * model.expert_bytes / chip.bandwidth_bytes_s
        return max(read_s, 2 * model.expert_params * pairs / chip.flops)

    def _answer(self, worker: _Worker) -> None:
        for call in worker.serving:
            worker.outstanding -= call.tokens
            engine = call.engine
            if engine.generation != call.generation:
                continue
            engine.pending -= 1
            engine.reply_s = max(engine.reply_s, self._now_s + self._wire_s(call, worker))
            if engine.pending == 0:
                self._at(engine.reply_s, self._guarded(engine, self._end_layer))
        worker.serving = []
        if worker.waiting:
            self._serve(worker)

    def _end_layer(self, engine: _Engine) -> None:
        engine.layer += 1
        if engine.layer < self._cluster.model.num_moe_layers:
            self._at(self._now_s + engine.layer_s, self._guarded(engine, self._call_layer))
        else:
            self._end_step(engine)

    def _end_step(self, engine: _Engine) -> None:
        for request, count in engine.chunks:
            request.cached += count
            request.prompt_left = max(0, request.prompt_left - count)
            if request.prompt_left:
                continue
            self._record.token(self._now_s, request.sent_s, request.last_s)
            request.last_s = self._now_s
            request.output_left -= 1
            if not request.output_left:
                self._record.complete(self._now_s)
                self._at(self._now_s, self._send_again)
        engine.running = [request for request in engine.running if request.output_left]
        self._begin_step(engine)

    # -- losses -------------------------------------------------------------------------------------------------------

    def _lose(self, node: str) -> None:
        for worker in (each for replicas in self._workers for each in replicas if each.node == node):
            lost = [*worker.serving, *worker.waiting]
            worker.serving, worker.waiting, worker.outstanding = [], deque(), 0
            worker.is_alive = False
            worker.generation += 1
            for call in lost:
                self._at(self._now_s + self._costs.notice_s, lambda call=call: self._ask(call, self._now_s))  # type: ignore[misc]
        for engine in self._engines:
            if engine.node == node and engine.is_alive:
                for _ in range(engine.load):
                    self._record.fail()
                    self._at(self._now_s + self._costs.notice_s, self._send_again)
                engine.is_alive = engine.is_busy = False
                engine.running, engine.waiting = [], deque()
                engine.generation += 1

    def _bring_back(self, node: str) -> None:
        for engine in self._engines:
            engine.is_alive |= engine.node == node
        for shard, replicas in enumerate(self._workers):
            for worker in replicas:
                worker.is_alive |= worker.node == node
            parked, self._parked[shard] = self._parked[shard], []
            for call in parked:
                self._ask(call, self._now_s)


def _chunks(running: Sequence[_Request], budget: int) -> Iterator[tuple[_Request, int]]:
    """What a step computes: a token of every decoding request, then prompts as far as the budget goes."""
    for request in running:
        if not request.prompt_left and budget:
            budget -= 1
            yield request, 1
    for request in running:
        if request.prompt_left and budget:
            count = min(request.prompt_left, budget)
            budget -= count
            yield request, count


def _shards_of_layer(shards: Sequence[SimShard], layer: int) -> list[int]:
    return [number for number, shard in enumerate(shards) if shard.first_layer <= layer < shard.end_layer]


def _popularity(model: ModelFacts, skew: float, generator: np.random.Generator) -> list[np.ndarray]:
    """Of each layer: how often each expert is chosen; which ones are hot differs from layer to layer."""
    weights_E = 1.0 / np.arange(1, model.num_experts + 1) ** skew
    weights_E /= weights_E.sum()
    return [generator.permutation(weights_E) for _ in range(model.num_moe_layers)]
