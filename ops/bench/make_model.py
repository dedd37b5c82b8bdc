"""`switchyard bench make-model`: a checkpoint with random weights, a small Mixtral or Grok at its full width.

The weights are model/random_checkpoint.py's. The tokenizer is byte-level: 256 bytes that encode any text, and made-up
words for the rest of the vocabulary, so that every token the model samples decodes to something. (ckpt-0 gets none:
Grok-1's is a SentencePiece file, and without one prompts and answers are token ids.)

Shapes: D hidden, F expert inner size, E experts, N attention heads, H head dimension, V vocabulary.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError
from ops.convert import ProgressLines

if TYPE_CHECKING:
    from deployments.random_checkpoints import RandomCheckpoint

EXAMPLES = """\
  switchyard bench make-model /tmp/bench-mixtral
  switchyard bench make-model /tmp/grok1-wide --shape grok-1 --layers 1    as ckpt-0; then: switchyard convert
  switchyard bench make-model /tmp/grok2-wide --shape grok-2 --layers 1    as xai-org/grok-2, served as it lies
"""
MIXTRAL = "mixtral"
# shape -> the formats in which it is written, the default first
FORMATS = {MIXTRAL: ("hf",), "grok-1": ("ckpt-0", "hf"), "grok-2": ("tp8", "hf")}
# option -> Grok's name of the size (model/grok_spec.py), and what it is
SIZES = {
    "hidden": ("hidden_size", "hidden size"),
    "expert": ("expert_size", "inner size of an expert"),
    "layers": ("num_layers", "number of layers, all with experts"),
    "experts": ("num_experts", "number of experts per layer"),
    "top_k": ("top_k", "experts chosen per token"),
    "heads": ("num_heads", "attention heads"),
    "kv_heads": ("num_kv_heads", "key/value heads"),
    "head_dim": ("head_dim", "size of a head"),
    "vocab": ("vocab_size", "vocabulary size in tokens"),
}
PROGRESS_S = 5.0
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
        check_sizes(vars(self))
        if self.hidden % self.heads:
            raise ConfigError(f"--hidden: {self.hidden} is not a multiple of --heads ({self.heads}).")
        if self.head_dim % 2:
            raise ConfigError(f"--heads: a head of {self.head_dim} values cannot be rotated; it must be even.")
        if self.heads % self.kv_heads:
            raise ConfigError(f"--heads: {self.heads} is not a multiple of --kv-heads ({self.kv_heads}).")
        if self.top_k > self.experts:
            raise ConfigError(f"--top-k: {self.top_k} is more than --experts ({self.experts}).")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raises ConfigError for a size (by its name in SIZES) that no model can have."""
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{_option(name)}: is {value}, must be 1 or more.")
    least = 256 + len(SPECIAL_TOKENS)
    if sizes.get("vocab", least) < least:
        raise ConfigError(f"--vocab: is {sizes['vocab']}, must be {least} or more: 256 bytes and the special tokens.")


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
        "initializer_range": 0.02,
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


def mixtral_checkpoint(shape: ModelShape) -> "RandomCheckpoint":
    """The Mixtral of that shape, not yet written."""
    from deployments.random_checkpoints import hub_checkpoint

    return hub_checkpoint(shard_plan(shape), config_json(shape), shape.vocab)


def make_model(destination: Path, shape: ModelShape, seed: int = 0) -> None:
    """Write a random Mixtral into `destination`; see write_checkpoint."""
    write_checkpoint(destination, mixtral_checkpoint(shape), seed)


def write_checkpoint(destination: Path, checkpoint: "RandomCheckpoint", seed: int) -> None:
    """Write the checkpoint into `destination`, a folder that must not exist yet (or be empty).

    It appears under its name only when complete. Raises ConfigError where it would overwrite, the disk is too small or
    cannot be written.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ConfigError(f"{destination} exists already. Give a new folder, or remove it first.")
    _check_disk(destination, checkpoint.num_bytes)
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        checkpoint.write(partial, seed, ProgressLines(sys.stderr, PROGRESS_S, time.monotonic))
        if checkpoint.vocab_size is not None:
            write_tokenizer(partial, checkpoint.vocab_size)
        partial.rename(destination)
    except OSError as error:
        raise ConfigError(f"{error.filename or destination}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_disk(destination: Path, checkpoint_bytes: int) -> None:
    needed_bytes = checkpoint_bytes + DISK_RESERVE_BYTES
    existing = next(folder for folder in destination.absolute().parents if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"{existing} has {free_bytes / 1e9:.2f} GB left, the checkpoint needs {needed_bytes / 1e9:.2f} GB. "
            "Make room, write it elsewhere, or give fewer --layers."
        )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `switchyard bench make-model`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("destination", type=Path, metavar="DST", help="new folder for the checkpoint")
    parser.add_argument(
        "--shape",
        choices=tuple(FORMATS),
        default=MIXTRAL,
        help="mixtral: a small one, for benchmarks. grok-1, grok-2: with the released dimensions (%(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=tuple(dict.fromkeys(name for formats in FORMATS.values() for name in formats)),
        help="ckpt-0: Grok-1 as released. tp8: Grok-2 as released, experts in eight parts. "
        "hf: Hugging Face's, one bfloat16 file per layer (default: as released)",
    )
    defaults = vars(ModelShape())
    for name, (_, text) in SIZES.items():
        default = defaults.get(name, "hidden / heads")
        help_text = f"{text} (mixtral: {default}, Grok: as released)"
        parser.add_argument(_option(name), type=int, metavar="N", help=help_text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Exit status of `switchyard bench make-model`."""
    checkpoint = _checkpoint(args)
    size = f"{checkpoint.num_bytes / 1e9:.2f} GB"
    print(f"Writing a random {args.shape}, {size}, to {args.destination}", file=sys.stderr, flush=True)
    write_checkpoint(args.destination, checkpoint, args.seed)
    print(args.destination)
    return 0


def _checkpoint(args: argparse.Namespace) -> "RandomCheckpoint":
    """What the options ask for. Raises ConfigError for a format or sizes that the shape does not have."""
    formats = FORMATS[args.shape]
    layout = args.format or formats[0]
    if layout not in formats:
        raise ConfigError(f"--format: {args.shape} is written as {' or '.join(formats)}, not as {layout}.")
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if args.shape == MIXTRAL:
        if "head_dim" in sizes:
            raise ConfigError("--head-dim: is for Grok; a head of Mixtral has --hidden / --heads values.")
        return mixtral_checkpoint(ModelShape(**sizes))
    check_sizes(sizes)
    from deployments.random_checkpoints import grok_checkpoint

    return grok_checkpoint(args.shape, layout, {SIZES[name][0]: value for name, value in sizes.items()})


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
