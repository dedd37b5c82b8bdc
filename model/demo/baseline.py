"""What the demo model is measured against: a unigram and a modified Kneser-Ney 5-gram over the same tokens.

Formulas: Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", section 3:
interpolated modified Kneser-Ney, three discounts per order estimated from counts of counts; the unigram is interpolated
with 1/V.
An n-gram is one int64: 12 bits a token, the predicted token in the lowest bits (so V <= 4096 and n <= 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BITS, MAX_ORDER = 12, 5
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def pack(documents: list[list[int]], eos: int) -> Ints:
    """One packed 5-gram per token of every document, the first ones padded on the left with eos."""
    grams = []
    for document in documents:
        padded = np.array([eos] * (MAX_ORDER - 1) + document, dtype=np.int64)
        size = len(document)
        grams.append(sum((padded[i : i + size] << (BITS * (MAX_ORDER - 1 - i)) for i in range(MAX_ORDER)), np.int64(0)))
    return np.concatenate(grams)


@dataclass(frozen=True)
class _Order:
    """One order's tables: n-grams with discounted counts; contexts with totals and the mass left to the lower order."""

    grams: Ints
    discounted: Floats
    contexts: Ints
    totals: Floats
    backoff: Floats


def _build(grams: Ints, counts: Ints) -> _Order:
    """Tables of one order from its (adjusted) counts; `grams` is sorted and unique."""
    n1, n2, n3, n4 = (max(1, int((counts == k).sum())) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    discount = discounts[np.minimum(counts, 3)]
    contexts, starts = np.unique(grams >> BITS, return_index=True)
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    return _Order(grams, counts - discount, contexts, totals, np.add.reduceat(discount, starts) / totals)


def _find(table: Ints, keys: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """(positions, found) of keys in a sorted table."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


class KneserNey:
    """Interpolated modified Kneser-Ney of orders 1 to 5."""

    def __init__(self, documents: list[list[int]], vocab_size: int, eos: int) -> None:
        if vocab_size > 1 << BITS:
            raise ValueError(f"vocabulary of {vocab_size} does not fit {BITS} bits")
        self.vocab_size, self.eos = vocab_size, eos
        grams, counts = np.unique(pack(documents, eos), return_counts=True)
        self.orders = [_build(grams, counts)]
        for order in range(MAX_ORDER - 1, 0, -1):  # lower orders count distinct left neighbours
            grams, counts = np.unique(grams & ((1 << (BITS * order)) - 1), return_counts=True)
            self.orders.append(_build(grams, counts))
        self.orders.reverse()

    def nats(self, documents: list[list[int]], max_order: int = MAX_ORDER) -> Floats:
        """-ln p of every token but each document's first, in order."""
        packed = pack(documents, self.eos)
        p = np.full(len(packed), 1 / self.vocab_size)
        for n, order in enumerate(self.orders[:max_order], start=1):
            keys = packed & ((1 << (BITS * n)) - 1)
            gram_at, gram_found = _find(order.grams, keys)
            context_at, context_found = _find(order.contexts, keys >> BITS)
            own = np.where(gram_found, order.discounted[gram_at], 0) / order.totals[context_at]
            p = np.where(context_found, own + order.backoff[context_at] * p, p)
        firsts = np.cumsum([0] + [len(document) for document in documents[:-1]])
        return np.delete(-np.log(p), firsts)


def unigram_nats(train: list[list[int]], held_out: list[list[int]], vocab_size: int) -> Floats:
    """-ln p under training frequencies with one added to every count; same tokens as KneserNey.nats."""
    counts = np.bincount(np.concatenate([np.array(d) for d in train]), minlength=vocab_size) + 1.0
    return np.concatenate([-np.log(counts[np.array(d[1:])] / counts.sum()) for d in held_out])
