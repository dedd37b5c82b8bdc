"""What integer experts cost the demo model: perplexity on held-out text, and how often the likeliest token is the same.

The network is the plain torch one of model/demo/network.py with the weights that the stored integers stand for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F  # noqa: N812

from model.demo.corpus import load_corpus
from model.demo.network import Grok2, GrokConfig
from model.demo.text import encode_chapters, held_out_windows
from model.expert_weights import whole_weights
from model.hub_checkpoint import convert_hub
from model.moe_spec import weight_files
from model.quantised import Precision

PRECISIONS: tuple[Precision | Literal["bf16"], ...] = ("bf16", "int8", "int4")


@dataclass(frozen=True)
class Quality:
    """Of one precision on `num_tokens` held-out tokens. agreement: share of them whose likeliest token is bf16's."""

    precision: str
    num_tokens: int
    perplexity: float
    agreement: float


def measure(folder: Path, cache: Path, max_tokens: int | None, say: Callable[[str], None]) -> list[Quality]:
    """bf16, int8 and int4 of the checkpoint in `folder`, which must have the demo model's architecture.

    cache: where the corpus' packages are kept. max_tokens: how much of the text is read, None for all. Raises
    CorpusError without the text, CheckpointError for another kind of model.
    """
    _, held_out = load_corpus(cache)
    documents = encode_chapters(Tokenizer.from_file(str(folder / "tokenizer.json")), held_out)
    documents = list(_first(documents, max_tokens))
    found: list[Quality] = []
    reference_T: torch.Tensor | None = None
    for precision in PRECISIONS:
        say(f"{precision}: {sum(map(len, documents)) - len(documents)} tokens")
        nats_T, best_T = _read(_network(folder, precision), documents)
        reference_T = best_T if reference_T is None else reference_T
        agreement = (best_T == reference_T).double().mean().item()
        found.append(Quality(precision, len(nats_T), nats_T.mean().exp().item(), agreement))
    return found


def _first(documents: list[list[int]], max_tokens: int | None) -> Iterator[list[int]]:
    """Documents, evenly spread over all, until there are so many tokens."""
    total = sum(map(len, documents))
    every = 1 if max_tokens is None else max(1, total // max_tokens)
    yield from documents[::every]


def _network(folder: Path, precision: Precision | Literal["bf16"]) -> Grok2:
    with TemporaryDirectory(prefix="switchyard-quality-") as converted:
        if precision != "bf16":
            convert_hub(folder, converted, precision)
        weights = whole_weights(weight_files(Path(converted) if precision != "bf16" else folder))
        network = Grok2(GrokConfig.from_json(folder / "config.json"))
        network.load_state_dict({name: tensor.float() for name, tensor in weights}, strict=True)
    return network.eval()


@torch.no_grad()
def _read(network: Grok2, documents: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(-ln p of every token but each document's first, the likeliest token in its place)."""
    nats, best = [], []
    for inputs, targets in held_out_windows(documents, network.config.max_position_embeddings):
        logits_TV = network(inputs)[0]
        nats.append(F.cross_entropy(logits_TV, targets[0], reduction="none").double())
        best.append(logits_TV.argmax(-1))
    return torch.cat(nats), torch.cat(best)
