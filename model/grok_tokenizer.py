"""Grok's two tokenizers as Hugging Face tokenizers: xAI's own files -> a folder that Transformers and vLLM load.

Grok-1 has tokenizer.model (SentencePiece BPE with byte fallback; pieces of the kind "user defined" are cut out of the
text before merging). Grok-2 has tokenizer.tok.json (byte-level BPE as in tiktoken, rank = token id). Both merge the
adjacent pair whose union has the best rank, whatever the two halves are; so every way to cut a token into two tokens
becomes a merge here, in the order of the union's rank.

Sources: google/sentencepiece src/bpe_model.cc and src/normalizer.cc, openai/tiktoken src/lib.rs, SGLang
srt/tokenizer/tiktoken_tokenizer.py for tokenizer.tok.json, the pattern "V1" and the chat template.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cluster.errors import CheckpointError

GROK1_FILE = "tokenizer.model"
GROK2_FILE = "tokenizer.tok.json"

PAD, SEPARATOR, EOS = "<|pad|>", "<|separator|>", "<|eos|>"
CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{ 'System: ' + m['content'].strip() + '<|separator|>\\n\\n' }}"
    "{%- elif m['role'] == 'user' -%}{{ 'Human: ' + m['content'].strip() + '<|separator|>\\n\\n' }}"
    "{%- elif m['role'] == 'assistant' -%}{{ 'Assistant: ' + m['content'] + '<|separator|>\\n\\n' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
)

_WORD_SPLIT_V1 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "\u2581"
# sentencepiece_model.proto
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6


def write_grok1(source: Path, folder: Path) -> None:
    """Convert Grok-1's tokenizer.model into `folder`. Raises CheckpointError for another kind of model."""
    model = _sentencepiece_model(source)
    tokenizer = _grok1_tokenizer(model)
    special = [piece.piece for piece in model.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([_special(token) for token in special])
    trainer = model.trainer_spec
    config = {
        "pad_token": trainer.pad_piece,
        "bos_token": trainer.bos_piece,
        "eos_token": trainer.eos_piece,
        "unk_token": trainer.unk_piece,
        "split_special_tokens": True,  # SentencePiece reads "[EOS]" in a prompt as text
    }
    _save(folder, tokenizer, {name: token for name, token in config.items() if token})


def write_grok2(source: Path, folder: Path) -> None:
    """Convert Grok-2's tokenizer.tok.json, with its chat template and stop tokens, into `folder`.

    Raises CheckpointError, naming the file, for anything that is not such a file.
    """
    regular, special, pattern = _read_tok_json(source)
    letters = _byte_letters()
    ranks = {"".join(letters[byte] for byte in token): rank for token, rank in regular.items()}
    if clash := ranks.keys() & special.keys():
        raise CheckpointError(f"{source}: {min(clash)} is a regular token and a special one.")
    tokenizer = Tokenizer(models.BPE(vocab=ranks | special, merges=_merges(ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(source, pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_special(token) for token in special])
    _save(folder, tokenizer, {"pad_token": PAD, "eos_token": EOS, "additional_special_tokens": [SEPARATOR]})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    stops = {"eos_token_id": [special[EOS], special[SEPARATOR]], "pad_token_id": special[PAD]}
    _write_json(folder / "generation_config.json", stops)


def _grok1_tokenizer(model: Any) -> Tokenizer:
    ranks = {piece.piece: -piece.score for piece in model.pieces if piece.type == _NORMAL}
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    unknown = next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN)
    # ignore_merges: a user-defined piece stands alone in its split and is taken whole, though no merge leads to it.
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(ranks), unk_token=unknown, byte_fallback=True, ignore_merges=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    cut_out = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED and " " not in piece.piece]
    if cut_out:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_any_of(cut_out)), behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _sentencepiece_model(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise CheckpointError(f"{path} is not a SentencePiece model. Is the file complete?") from None
    wanted = {
        "a BPE model": model.trainer_spec.model_type == _BPE,
        "bytes as fallback": sum(piece.type == _BYTE for piece in model.pieces) == 256,
        "one unknown piece": sum(piece.type == _UNKNOWN for piece in model.pieces) == 1,
        "the identity as normaliser": not model.normalizer_spec.precompiled_charsmap,
        "spaces kept as they are": not model.normalizer_spec.remove_extra_whitespaces,
        "a space before the text": model.normalizer_spec.add_dummy_prefix,
        "spaces before words": not model.trainer_spec.treat_whitespace_as_suffix,
    }
    missing = [words for words, is_there in wanted.items() if not is_there]
    if missing:
        raise CheckpointError(
            f"{path} is not like Grok-1's tokenizer.model: it lacks {', '.join(missing)}. "
            "Put a tokenizer.json beside it."
        )
    return model


def _read_tok_json(path: Path) -> tuple[dict[bytes, int], dict[str, int], str]:
    """Regular tokens by their bytes, special tokens by their text, and the pattern that splits words."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        regular = {bytes(entry["bytes"]): entry["token"] for entry in document["regular_tokens"]}
        special = {bytes(entry["bytes"]).decode(): entry["token"] for entry in document["special_tokens"]}
        size, split, pattern = document["vocab_size"], document["word_split"], document.get("pat_str")
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a tokenizer.tok.json ({type(error).__name__}: {error}).") from None
    if split != "V1":
        raise CheckpointError(f"{path}: word_split is {split!r}; only V1 is known. Put a tokenizer.json beside it.")
    numbers = [*regular.values(), *special.values()]
    num_entries = len(document["regular_tokens"]) + len(document["special_tokens"])
    if not all(isinstance(number, int) and 0 <= number < size for number in numbers):
        raise CheckpointError(f"{path}: a token's id is not a number below vocab_size, {size}.")
    if len(set(numbers)) != num_entries:
        raise CheckpointError(f"{path}: two entries have the same id or the same bytes.")
    lacking = [f"byte {byte}" for byte in range(256) if bytes([byte]) not in regular]
    lacking += [token for token in (PAD, SEPARATOR, EOS) if token not in special]
    if lacking:
        raise CheckpointError(f"{path} has no token for {', '.join(lacking[:4])}. Is the file complete?")
    return regular, special, pattern or _WORD_SPLIT_V1


def _regex(path: Path, pattern: Any) -> Regex:
    try:
        return Regex(pattern)
    # The library raises a bare Exception for a pattern that does not compile.
    except Exception as error:
        raise CheckpointError(f"{path}: pat_str is no pattern: {error}") from None


def _merges(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of tokens whose union is a token, best (lowest) rank of the union first."""
    cuts = [
        (rank, cut, token)
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return [(token[:cut], token[cut:]) for _, cut, token in sorted(cuts)]


def _any_of(pieces: Iterable[str]) -> str:
    """A pattern for the longest of `pieces`, as SentencePiece's prefix matcher takes it."""
    return "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies (GPT-2's encoder.py)."""
    own = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _save(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", fixed | dict(config))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
