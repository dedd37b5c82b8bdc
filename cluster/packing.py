"""Which experts of which layers go to which device: one rectangle (layers x experts) for each device that is used.

A band is a range of layers; the devices of a band divide every layer's experts among them. Bands take consecutive
devices of the given order, so that the first devices are the ones that are used. Sizes are counted in units: one
expert of one layer. Pure and deterministic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

_SEARCH_STEPS = 12
_SHORT_RUNS = 16


@dataclass(frozen=True)
class Slot:
    """A device that could hold a shard: its memory in units, and how many units it reads in a second."""

    capacity: int
    units_per_s: float


@dataclass(frozen=True)
class Block:
    """The experts [first_expert, end_expert) of the MoE layers [first_layer, end_layer), on device number `slot`."""

    slot: int
    first_layer: int
    end_layer: int
    first_expert: int
    end_expert: int

    @property
    def units(self) -> int:
        return (self.end_layer - self.first_layer) * (self.end_expert - self.first_expert)


def pack(slots: Sequence[Slot], num_layers: int, num_experts: int) -> tuple[Block, ...] | None:
    """Every expert of every layer on the first of `slots` that suffice; None where they do not."""
    heights = _bands([slot.capacity for slot in slots], num_layers, num_experts)
    if heights is None:
        return None
    blocks: list[Block] = []
    layer = 0
    for first, end, height in heights:
        shares = _shares(slots[first:end], height, num_experts)
        expert = 0
        for slot, share in enumerate(shares, first):
            if share:
                blocks.append(Block(slot, layer, layer + height, expert, expert + share))
            expert += share
        layer += height
    return tuple(blocks)


def pack_evenly(slots: Sequence[Slot], num_layers: int, num_experts: int) -> tuple[Block, ...] | None:
    """As pack(), but over all of `slots`, so that the slowest has as little to read as possible."""
    best = pack(slots, num_layers, num_experts)
    if best is None:
        return None
    low, high = 0.0, max(slot.capacity / slot.units_per_s for slot in slots)
    for _ in range(_SEARCH_STEPS):
        limit_s = (low + high) / 2
        capped = [Slot(min(s.capacity, int(limit_s * s.units_per_s)), s.units_per_s) for s in slots]
        found = pack(capped, num_layers, num_experts)
        if found is None:
            low = limit_s
        else:
            best, high = found, limit_s
    return best


def _bands(capacities: Sequence[int], num_layers: int, num_experts: int) -> list[tuple[int, int, int]] | None:
    """(first device, end device, layers) of each band; the fewest devices from the front, then the fewest bands."""
    tallest = _HeightCache(capacities, num_layers, num_experts)
    covered, begin = [0], [0]  # by the first so many devices: layers covered, where the last band begins
    for end in range(1, len(capacities) + 1):
        best, first = covered[end - 1], end
        for length in tallest.run_lengths:
            if length <= end and covered[end - length] + (height := tallest(end - length, end)) >= best and height:
                best, first = covered[end - length] + height, end - length
        covered.append(best)
        begin.append(first)
        if best >= num_layers:
            return _trimmed(begin, covered, end, num_layers)
    return None


def _trimmed(begin: list[int], covered: list[int], end: int, num_layers: int) -> list[tuple[int, int, int]]:
    """The bands in order, without the layers that there are too many of; the last one alone could spare them all."""
    bands: list[tuple[int, int, int]] = []
    while end > 0:
        first = begin[end]
        if first == end:  # this device is not used
            end -= 1
            continue
        bands.append((first, end, covered[end] - covered[first]))
        end = first
    surplus = sum(height for *_, height in bands) - num_layers
    kept = []
    for number, (first, last, height) in enumerate(reversed(bands)):
        cut = min(height - 1, math.ceil(surplus / (len(bands) - number)))
        surplus -= cut
        kept.append((first, last, height - cut))
    return kept


class _HeightCache:
    """The most layers that a run of consecutive devices can hold all experts of; runs of like devices are alike."""

    def __init__(self, capacities: Sequence[int], num_layers: int, num_experts: int) -> None:
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._borders = [place for place, size in enumerate(capacities) if not place or size != capacities[place - 1]]
        self._sizes = [capacities[place] for place in self._borders]
        self._borders.append(len(capacities))
        # With k experts on each device, a run needs ceil(E / k) of them: one more would not make it taller.
        lengths = {math.ceil(num_experts / each) for each in range(1, num_experts + 1)}
        lengths |= set(range(1, min(_SHORT_RUNS, num_experts) + 1))
        self.run_lengths = sorted(lengths)
        self._tallest = functools.cache(self._search)

    def __call__(self, first: int, end: int) -> int:
        counts = [
            (size, min(end, border_end) - max(first, border))
            for size, border, border_end in zip(self._sizes, self._borders, self._borders[1:], strict=False)
            if border < end and border_end > first
        ]
        return self._tallest(tuple(counts))

    def _search(self, counts: tuple[tuple[int, int], ...]) -> int:
        low, high = 0, self._num_layers
        while low < high:
            height = (low + high + 1) // 2
            if sum(count * min(self._num_experts, size // height) for size, count in counts) >= self._num_experts:
                low = height
            else:
                high = height - 1
        return low


def _shares(slots: Sequence[Slot], height: int, num_experts: int) -> list[int]:
    """How many of a band's experts each device gets: within its memory, and so that all read about equally long."""
    shares = [0] * len(slots)
    for _ in range(num_experts):
        able = [n for n, slot in enumerate(slots) if (shares[n] + 1) * height <= slot.capacity]
        chosen = min(able, key=lambda n: ((shares[n] + 1) / slots[n].units_per_s, n))
        shares[chosen] += 1
    return shares
