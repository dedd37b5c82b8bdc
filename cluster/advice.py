"""What would make a model fit: the single changes, or pairs of them, that lead to a plan. The cheapest come first.

Every piece of advice has been tried: its plan exists. Pure, as the planner is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.engine_options import Wishes, has_gpus, some_counts
from cluster.inventory import Chip, Inventory, Node
from cluster.planner import ClusterPlan, make_plan
from cluster.roofline import CallCost, ModelFacts

_MOST_CARDS = 64
_MOST_HOST_FACTOR = 64


@dataclass(frozen=True)
class Question:
    """What was asked of the planner. `models` are the same model by the precision of its experts, the best first."""

    models: Mapping[str, ModelFacts]
    precision: str
    inventory: Inventory
    wishes: Wishes

    @property
    def model(self) -> ModelFacts:
        return self.models[self.precision]


@dataclass(frozen=True)
class Advice:
    """A change in words, and the plan that it leads to."""

    text: str
    plan: ClusterPlan


def advise(question: Question, call_cost: CallCost) -> list[Advice]:
    """Changes that cost nothing first (precision, host memory, fewer requests), then cards and memory to buy.

    Pairs are tried only where no single change that costs nothing helps.
    """

    def planned(changed: Question) -> ClusterPlan | None:
        found = make_plan(changed.model, changed.inventory, changed.wishes, call_cost)
        return found if isinstance(found, ClusterPlan) else None

    free = [*_precisions(question), *_host_experts(question), *_fewer_requests(question, planned)]
    found = _working(free, planned)
    if not found:
        pairs = [
            (f"{text}, and {more}", both)
            for text, changed in _precisions(question)
            for more, both in [*_host_experts(changed), *_fewer_requests(changed, planned)]
        ]
        found = _working(pairs, planned)[:2]
    return found + _working(_more_hardware(question, planned), planned)


Changed = tuple[str, Question]
Planned = Callable[[Question], ClusterPlan | None]


def _working(changes: Sequence[Changed] | Iterator[Changed], planned: Planned) -> list[Advice]:
    return [Advice(text, plan) for text, changed in changes if (plan := planned(changed)) is not None]


def _precisions(question: Question) -> Iterator[Changed]:
    """The precisions after the one that was asked for, the next one first."""
    names = list(question.models)
    for name in names[names.index(question.precision) + 1 :]:
        yield f"experts in {name} (--experts {name})", replace(question, precision=name)


def _host_experts(question: Question) -> Iterator[Changed]:
    wishes = question.wishes
    if has_gpus(question.inventory) and not wishes.host_experts and any(n.host for n in question.inventory.nodes):
        yield (
            "experts in host memory too (--host-experts)",
            replace(question, wishes=replace(wishes, host_experts=True)),
        )


def _fewer_requests(question: Question, planned: Planned) -> Iterator[Changed]:
    """The most requests at once, else the longest context for one, that fits: halved until it does."""
    wishes = question.wishes
    concurrency = wishes.concurrency // 2
    while concurrency:
        changed = replace(question, wishes=replace(wishes, concurrency=concurrency))
        if planned(changed) is not None:
            yield f"{concurrency} requests at the same time (--concurrency {concurrency})", changed
            return
        concurrency //= 2


def _more_hardware(question: Question, planned: Planned) -> Iterator[Changed]:
    """The fewest more cards of each kind, and the least more host memory where experts may live there."""
    for place, node in enumerate(question.inventory.nodes):
        if node.gpu is not None and _is_first_of_its_kind(question.inventory, place):
            yield from _more_cards(question, place, planned)
    if not has_gpus(question.inventory) or question.wishes.host_experts:
        yield from _more_memory(question, planned)


def _is_first_of_its_kind(inventory: Inventory, place: int) -> bool:
    return all(node.gpu != inventory.nodes[place].gpu for node in inventory.nodes[:place])


def _more_cards(question: Question, place: int, planned: Planned) -> Iterator[Changed]:
    node = question.inventory.nodes[place]
    assert node.gpu is not None
    for more in some_counts(1, _MOST_CARDS):
        changed = _with_node(question, place, replace(node, num_gpus=node.num_gpus + more))
        if planned(changed) is not None:
            size = node.gpu.memory_bytes / 1e9
            yield f"{more} more GPU{'s' * (more > 1)} of {size:.0f} GB in {node.name}", changed
            return


def _more_memory(question: Question, planned: Planned) -> Iterator[Changed]:
    for place, node in enumerate(question.inventory.nodes):
        if node.host is None:
            continue
        for factor in some_counts(2, _MOST_HOST_FACTOR):
            memory = node.host.memory_bytes * factor
            host = Chip(memory, node.host.bandwidth_bytes_s, node.host.flops)
            changed = _with_node(question, place, replace(node, host=host))
            if planned(changed) is not None:
                yield f"{memory * node.num_host_workers / 1e9:.0f} GB of host memory in {node.name}", changed
                return


def _with_node(question: Question, place: int, node: Node) -> Question:
    nodes = list(question.inventory.nodes)
    nodes[place] = node
    return replace(question, inventory=replace(question.inventory, nodes=tuple(nodes)))
