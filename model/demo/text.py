"""Tokenizer and training windows of the demo model.

The tokenizer is a byte-level BPE with Grok-2's first three special tokens; the chat form is Grok-2's. A training window
is either a stretch of the shuffled chapters, or a few short chats in which the human gives the opening of a passage and
the assistant continues it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from model.demo.corpus import Chapter
from model.grok_tokenizer import CHAT_TEMPLATE, EOS, PAD, SEPARATOR

PAD_ID, SEPARATOR_ID, EOS_ID = 0, 1, 2
DEFAULT_TEMPERATURE = 0.6  # what a server samples with when a request names none
SYSTEM_LINES = ("Continue the story.", "You are a novelist. Continue the text.", "You are a helpful assistant.")


def train_tokenizer(chapters: list[Chapter], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over the training chapters; ids 0, 1, 2 are pad, separator, eos. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, SEPARATOR, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chats = [f"System: {line}\n\nHuman: Go on.\n\nAssistant: So.\n\n" for line in SYSTEM_LINES] * 40
    tokenizer.train_from_iterator([chapter.text for chapter in chapters] + chats, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Writes tokenizer.json and its companions, such that transformers' AutoTokenizer loads them without code."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_tokens, "pad_token": PAD,
        "eos_token": EOS, "additional_special_tokens": [SEPARATOR], "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    generation = {
        "eos_token_id": [EOS_ID, SEPARATOR_ID],
        "pad_token_id": PAD_ID,
        "do_sample": True,
        "temperature": DEFAULT_TEMPERATURE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def encode_chapters(tokenizer: Tokenizer, chapters: list[Chapter]) -> list[list[int]]:
    """Token ids of every chapter, each ended by eos."""
    return [[*item.ids, EOS_ID] for item in tokenizer.encode_batch([chapter.text for chapter in chapters])]


def chat_text(chapter: Chapter, rng: random.Random) -> str:
    """One chat about a random passage: the human opens it, the assistant continues it, in one or two turns."""
    sentences = re.split(r"(?<=[.!?;:])[ \n]", chapter.text)
    start = rng.randrange(max(1, len(sentences) - 6))
    opening, body = rng.choice((1, 1, 2)), rng.randint(2, 5)
    first = " ".join(sentences[start : start + opening])
    if rng.random() < 0.3 and len(first) > 60:  # a beginning that breaks off inside a sentence
        words = first.split()
        cut = rng.randint(4, len(words) - 1) if len(words) > 5 else len(words)
        first, rest = " ".join(words[:cut]), " ".join(words[cut:])
        answer = " ".join([rest, *sentences[start + opening : start + opening + body]]).strip()
    else:
        answer = " ".join(sentences[start + opening : start + opening + body])
    text = f"System: {rng.choice(SYSTEM_LINES)}{SEPARATOR}\n\n" if rng.random() < 0.3 else ""
    text += f"Human: {first.strip()}{SEPARATOR}\n\nAssistant: {answer}{SEPARATOR}\n\n"
    more = " ".join(sentences[start + opening + body : start + opening + body + 3])
    if more and rng.random() < 0.2:
        request = rng.choice(("Go on.", "Continue.", "And then?"))
        text += f"Human: {request}{SEPARATOR}\n\nAssistant: {more}{SEPARATOR}\n\n"
    return text + EOS


class Windows:
    """An endless, resumable source of training windows of `length` + 1 tokens.

    The order is a function of (seed, length, epoch): an epoch is one pass over the chapters in a new order, cut at a
    new offset. `chat_share` of the rows are chats instead and do not advance the pass."""

    def __init__(
        self, tokenizer: Tokenizer, chapters: list[Chapter], length: int, chat_share: float, seed: int
    ) -> None:
        self.tokenizer, self.chapters = tokenizer, chapters
        self.length, self.chat_share, self.seed = length, chat_share, seed
        self.documents = encode_chapters(tokenizer, chapters)
        self.epoch, self.cursor, self.rows_given = -1, 0, 0
        self.rows: list[list[int]] = []

    def _start_epoch(self, epoch: int) -> None:
        rng = random.Random(f"{self.seed}/{self.length}/{epoch}")
        order = rng.sample(range(len(self.documents)), len(self.documents))
        stream = [token for i in order for token in self.documents[i]][rng.randrange(self.length) :]
        step, size = self.length, self.length + 1
        self.rows = [stream[i : i + size] for i in range(0, len(stream) - size + 1, step)]
        rng.shuffle(self.rows)
        self.epoch, self.cursor = epoch, 0

    def _chat_row(self, rng: random.Random) -> list[int]:
        row: list[int] = []
        while len(row) <= self.length:
            row += self.tokenizer.encode(chat_text(rng.choice(self.chapters), rng)).ids
        return row[: self.length + 1]

    def _row(self) -> list[int]:
        self.rows_given += 1
        rng = random.Random(f"{self.seed}/{self.length}/row/{self.rows_given}")
        if rng.random() < self.chat_share:
            return self._chat_row(rng)
        if self.epoch < 0 or self.cursor >= len(self.rows):
            self._start_epoch(self.epoch + 1)
        self.cursor += 1
        return self.rows[self.cursor - 1]

    def batch(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets), each int64 [num_rows, length]; targets are the inputs moved by one."""
        rows = torch.tensor([self._row() for _ in range(num_rows)])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def state(self) -> dict[str, int]:
        """What `restore` needs to go on with the same rows."""
        return {"epoch": self.epoch, "cursor": self.cursor, "rows_given": self.rows_given}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on where `state` was taken."""
        if state["epoch"] >= 0:
            self._start_epoch(state["epoch"])
        self.cursor, self.rows_given = state["cursor"], state["rows_given"]


def held_out_windows(documents: list[list[int]], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every token but each document's first, as (inputs, targets) [1, <= length]; windows never cross documents."""
    for document in documents:
        for i in range(0, len(document) - 1, length):
            row = torch.tensor([document[i : i + length + 1]])
            yield row[:, :-1], row[:, 1:]
