"""`switchyard bench make-model`: a Mixtral checkpoint with random weights, of the size whose layer calls we measure.

Written shard by shard, so memory stays at one layer's weights. Weights are N(0, 0.02), which keeps activations of the
order of one through any number of layers. The tokenizer is byte-level: 256 bytes that encode any text, and made-up
words for the rest of the vocabulary, so that every token the model samples decodes to something.

Shapes: D hidden, F expert inner size, E experts, N attention heads, H head dimension, V vocabulary.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError

if TYPE_CHECKING:
    import torch

INIT_STD = 0.02
BYTES_PER_WEIGHT = 2  # bfloat16
DISK_RESERVE_BYTES = 64 << 20
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Mixtral checkpoint; all counts. The defaults are the benchmark's."""

    hidden: int = 1024
    expert: int = 2048
    layers: int = 12
    experts: int = 8
    top_k: int = 2
    heads: int = 16
    kv_heads: int = 4
    vocab: int = 32000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: is {value}, must be 1 or more.")
        if self.hidden % self.heads:
            raise ConfigError(f"--hidden: {self.hidden} is not a multiple of --heads ({self.heads}).")
        if self.head_dim % 2:
            raise ConfigError(f"--heads: a head of {self.head_dim} values cannot be rotated; it must be even.")
        if self.heads % self.kv_heads:
            raise ConfigError(f"--heads: {self.heads} is not a multiple of --kv-heads ({self.kv_heads}).")
        if self.top_k > self.experts:
            raise ConfigError(f"--top-k: {self.top_k} is more than --experts ({self.experts}).")
        least = 256 + len(SPECIAL_TOKENS)
        if self.vocab < least:
            raise ConfigError(f"--vocab: is {self.vocab}, must be {least} or more: 256 bytes and the special tokens.")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


TensorShapes = dict[str, tuple[int, ...]]


def shard_plan(shape: ModelShape) -> list[TensorShapes]:
    """The tensors of each file, by Hugging Face's names for Mixtral: one file per layer, one for the rest."""
    outer = {
        "model.embed_tokens.weight": (shape.vocab, shape.hidden),
        "model.norm.weight": (shape.hidden,),
        "lm_head.weight": (shape.vocab, shape.hidden),
    }
    return [outer, *(_layer_tensors(shape, layer) for layer in range(shape.layers))]


def _layer_tensors(shape: ModelShape, layer: int) -> TensorShapes:
    prefix = f"model.layers.{layer}."
    inner, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: TensorShapes = {
        "input_layernorm.weight": (shape.hidden,),
        "post_attention_layernorm.weight": (shape.hidden,),
        "self_attn.q_proj.weight": (inner, shape.hidden),
        "self_attn.k_proj.weight": (kv_size, shape.hidden),
        "self_attn.v_proj.weight": (kv_size, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, inner),
        "block_sparse_moe.gate.weight": (shape.experts, shape.hidden),
    }
    for expert in range(shape.experts):
        name = f"block_sparse_moe.experts.{expert}."
        tensors[name + "w1.weight"] = (shape.expert, shape.hidden)
        tensors[name + "w2.weight"] = (shape.hidden, shape.expert)
        tensors[name + "w3.weight"] = (shape.expert, shape.hidden)
    return {prefix + name: size for name, size in tensors.items()}


def num_weights(tensors: TensorShapes) -> int:
    """How many numbers these tensors hold."""
    return sum(_product(size) for size in tensors.values())


def _product(size: tuple[int, ...]) -> int:
    result = 1
    for extent in size:
        result *= extent
    return result


def config_json(shape: ModelShape) -> dict[str, Any]:
    """config.json as transformers writes it for MixtralForCausalLM."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.expert,
        "num_hidden_layers": shape.layers,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "use_cache": True,
        "bos_token_id": SPECIAL_TOKENS.index("<s>"),
        "eos_token_id": SPECIAL_TOKENS.index("</s>"),
    }


def tokenizer_vocabulary(num_tokens: int) -> dict[str, int]:
    """Token -> id: the special tokens, the 256 bytes in byte-level BPE's alphabet, then made-up words."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())]
    # "\u0120" is the byte-level alphabet's space. Words of two letters or more cannot clash with the bytes.
    tokens += ["\u0120" + _word(number) for number in range(num_tokens - len(tokens))]
    return {token: number for number, token in enumerate(tokens)}


def _word(number: int) -> str:
    """A distinct pronounceable word for each number: 105 syllables as digits, at least two of them."""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxyz" for vowel in "aeiou"]
    word = ""
    while number or len(word) < 4:
        number, digit = divmod(number, len(syllables))
        word = syllables[digit] + word
    return word


def write_tokenizer(folder: Path, num_tokens: int) -> None:
    """tokenizer.json and tokenizer_config.json, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=tokenizer_vocabulary(num_tokens), merges=[], unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    unknown, start, end = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "bos_token": start,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _random_shard(tensors: TensorShapes, generator: "torch.Generator") -> dict[str, "torch.Tensor"]:
    import torch

    weights = {}
    for name, size in tensors.items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            weights[name] = (torch.randn(size, generator=generator) * INIT_STD).to(torch.bfloat16)
    return weights


def write_weights(folder: Path, shape: ModelShape, seed: int) -> Iterator[tuple[int, int]]:
    """Writes the safetensors files and their index; yields (bytes written, bytes in all) after each file."""
    import torch
    from safetensors.torch import save_file

    plan = shard_plan(shape)
    total_bytes = BYTES_PER_WEIGHT * sum(map(num_weights, plan))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    written_bytes = 0
    for number, tensors in enumerate(plan):
        file = f"model-{number + 1:05d}-of-{len(plan):05d}.safetensors"
        save_file(_random_shard(tensors, generator), folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file leaves it readable by its owner alone
        weight_map |= dict.fromkeys(tensors, file)
        written_bytes += BYTES_PER_WEIGHT * num_weights(tensors)
        yield written_bytes, total_bytes
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def make_model(destination: Path, shape: ModelShape, seed: int = 0) -> None:
    """Write the checkpoint into `destination`, a folder that must not exist yet (or be empty).

    It appears under its name only when complete. Raises ConfigError where it would overwrite or the disk is too small.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ConfigError(f"{destination} exists already. Give a new folder, or remove it first.")
    _check_disk(destination, shape)
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_all(partial, shape, seed)
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_all(folder: Path, shape: ModelShape, seed: int) -> None:
    started = time.monotonic()
    _write_json(folder / "config.json", config_json(shape))
    write_tokenizer(folder, shape.vocab)
    for written_bytes, total_bytes in write_weights(folder, shape, seed):
        elapsed_s = time.monotonic() - started
        progress = f"  {written_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB, {elapsed_s:.0f} s"
        print(progress, file=sys.stderr, flush=True)


def _check_disk(destination: Path, shape: ModelShape) -> None:
    needed_bytes = BYTES_PER_WEIGHT * sum(map(num_weights, shard_plan(shape))) + DISK_RESERVE_BYTES
    existing = next(folder for folder in destination.absolute().parents if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"{existing} has {free_bytes / 1e9:.2f} GB left, the checkpoint needs {needed_bytes / 1e9:.2f} GB. "
            "Make room, or write it elsewhere."
        )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard bench make-model`."""
    default = ModelShape()
    parser.add_argument("destination", type=Path, metavar="DST", help="new folder for the checkpoint")
    texts = {
        "hidden": "hidden size",
        "expert": "inner size of an expert",
        "layers": "number of layers, all with experts",
        "experts": "number of experts per layer",
        "top_k": "experts chosen per token",
        "heads": "attention heads",
        "kv_heads": "key/value heads",
        "vocab": "vocabulary size in tokens",
    }
    for name, text in texts.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(default, name), metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Exit status of `switchyard bench make-model`."""
    shape = ModelShape(**{name: getattr(args, name) for name in vars(ModelShape())})
    print(f"Writing a random Mixtral checkpoint to {args.destination}", file=sys.stderr, flush=True)
    make_model(args.destination, shape, args.seed)
    print(args.destination)
    return 0
