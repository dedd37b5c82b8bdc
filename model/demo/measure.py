"""Figures of an exported demo checkpoint on held-out text: perplexity, expert load, repetition, samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.nn import functional as F  # noqa: N812

from model.demo.baseline import KneserNey, unigram_nats
from model.demo.corpus import PROVENANCE, Chapter
from model.demo.network import Grok2, generate
from model.demo.text import DEFAULT_TEMPERATURE, EOS_ID, SEPARATOR_ID, encode_chapters, held_out_windows
from model.grok_tokenizer import SEPARATOR

Floats = NDArray[np.float64]
STOP = (EOS_ID, SEPARATOR_ID)
PROMPTS = (
    "The old captain looked at the sea, and",
    "She opened the letter with a trembling hand, and",
    "And the king said unto his servants,",
    "Mr. Bennet was in the library when",
    "It was a cold and rainy evening, and the whole family",
)
CHATS = ("The carriage was late, and Emma had begun to be uneasy.", "Tell me about the whale.")


@dataclass(frozen=True)
class Score:
    """Mean loss of one model on one set of tokens. `bits_per_byte` counts the text's UTF-8 bytes."""

    nats_per_token: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """exp of nats per token; comparable only between models with this tokenizer."""
        return math.exp(self.nats_per_token)


def score(nats: Floats, num_bytes: int) -> Score:
    """From -ln p of every token."""
    return Score(float(nats.mean()), float(nats.sum()) / math.log(2) / num_bytes)


@torch.no_grad()
def network_nats(network: Grok2, documents: list[list[int]], length: int) -> tuple[Floats, Floats]:
    """(-ln p of every token but each document's first, expert load [L, E] as shares of all choices)."""
    c, nats = network.config, []
    counts_LE = torch.zeros(c.num_hidden_layers, c.num_local_experts)
    for inputs, targets in held_out_windows(documents, length):
        nats.append(F.cross_entropy(network(inputs)[0], targets[0], reduction="none").double().numpy())
        for layer, moe in enumerate(network.routers()):
            counts_LE[layer] += torch.bincount(moe.last_topk_NK.flatten(), minlength=c.num_local_experts)
    return np.concatenate(nats), (counts_LE / counts_LE.sum(1, keepdim=True)).double().numpy()


@dataclass(frozen=True)
class Figures:
    """Everything the model card states about the checkpoint on held-out text."""

    num_tokens: int
    num_bytes: int
    scores: dict[str, Score]  # by model
    by_source: dict[str, dict[str, Score]]  # by source, then model
    expert_load: Floats  # [L, E]


def measure(network: Grok2, tokenizer: Tokenizer, train: list[Chapter], held_out: list[Chapter]) -> Figures:
    """Scores network and baselines on the same held-out tokens."""
    train_ids, held_ids = encode_chapters(tokenizer, train), encode_chapters(tokenizer, held_out)
    context = network.config.max_position_embeddings
    own, load_LE = network_nats(network, held_ids, context)
    ngram = KneserNey(train_ids, network.config.vocab_size, EOS_ID)
    nats = {
        "demo model": own,
        "modified Kneser-Ney 5-gram": ngram.nats(held_ids),
        "modified Kneser-Ney 3-gram": ngram.nats(held_ids, 3),
        "unigram": unigram_nats(train_ids, held_ids, network.config.vocab_size),
    }
    bytes_of = np.array([len(chapter.text.encode()) for chapter in held_out])
    source_of = np.array([chapter.source for chapter in held_out])
    token_source = np.repeat(source_of, [len(ids) - 1 for ids in held_ids])
    by_source = {
        source: {
            name: score(values[token_source == source], int(bytes_of[source_of == source].sum()))
            for name, values in nats.items()
        }
        for source in PROVENANCE
    }
    total = int(bytes_of.sum())
    return Figures(len(own), total, {name: score(v, total) for name, v in nats.items()}, by_source, load_LE)


def loops(tokens: list[int], size: int = 6, times: int = 3) -> bool:
    """Whether some run of `size` tokens occurs at least `times` times."""
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return any(runs.count(run) >= times for run in set(runs))


def loop_share(network: Grok2, documents: list[list[int]], temp: float, num_prompts: int = 20) -> float:
    """Share of 100-token continuations of 24-token held-out openings that repeat themselves (see `loops`)."""
    step = max(1, len(documents) // num_prompts)
    openings = [document[:24] for document in documents[::step]][:num_prompts]
    found = [loops(generate(network, opening, 100, temp, (EOS_ID,), seed=i)) for i, opening in enumerate(openings)]
    return sum(found) / len(found)


def samples(network: Grok2, tokenizer: Tokenizer, num_tokens: int = 80) -> list[tuple[str, str, str]]:
    """(prompt, kind, continuation) for the fixed prompts; one seed each, nothing picked."""
    found = []
    for seed, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt).ids
        for kind, temp in (("greedy", 0.0), ("temperature 0.6", 0.6), ("temperature 0.8", 0.8)):
            found.append((prompt, kind, tokenizer.decode(generate(network, ids, num_tokens, temp, STOP, seed))))
    for seed, message in enumerate(CHATS, start=len(PROMPTS)):
        ids = tokenizer.encode(f"Human: {message}{SEPARATOR}\n\nAssistant:").ids
        answer = generate(network, ids, 120, DEFAULT_TEMPERATURE, STOP, seed)
        found.append((message, f"chat, temperature {DEFAULT_TEMPERATURE}", tokenizer.decode(answer)))
    return found
