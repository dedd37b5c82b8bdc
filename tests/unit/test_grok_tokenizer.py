"""Grok's tokenizers, converted: equal to xAI's goldens, and to SentencePiece and tiktoken on text that nobody chose."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from cluster.errors import CheckpointError, ConfigError
from deployments.models import has_tokenizer
from model.grok_tokenizer import write_grok1, write_grok2
from model.tokenizer_files import converted_tokenizer, find_tokenizer, tokenizer_args

GOLDENS = Path(__file__).parents[1] / "goldens"
GROK1_MODEL = GOLDENS / "grok1-tokenizer/tokenizer.model"
GROK1 = json.loads((GOLDENS / "grok1-tokenizer/golden.json").read_text(encoding="utf-8"))
GROK2_FOLDER = GOLDENS / "grok2-tiny/unsharded"
GROK2_FILE = GROK2_FOLDER / "tokenizer.tok.json"
GROK2 = json.loads((GOLDENS / "grok2-tiny/tokenizer_golden.json").read_text(encoding="utf-8"))

ALPHABETS = (
    "ab ",
    "aba",
    "\n\t\r 1a",
    "aA \u2581<|>control1",
    "的是一不 \u3000",
    "\x00\x7f\u0085e\u0301",
    "🙂👩\u200d👧 ñ",
    "ing the",
    "-=_*#",
    "0x1F ",
    "'sS\u017f'llRE ",
)


@pytest.fixture(scope="module")
def grok1(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grok1")
    write_grok1(GROK1_MODEL, folder)
    return folder


@pytest.fixture(scope="module")
def grok2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grok2")
    write_grok2(GROK2_FILE, folder)
    return folder


def load(folder: Path, **arguments):
    """As vLLM loads it, without vLLM."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **arguments)


def random_texts(pieces: list[str], count: int) -> list[str]:
    rng = random.Random(7)
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(count)]
    texts += ["".join(rng.choices(letters, k=rng.randint(1, 40))) for letters in ALPHABETS for _ in range(count // 10)]
    ranges = (range(32, 127), range(0xA0, 0x2FFF), range(0x4E00, 0x9FFF), range(0x1F300, 0x1F9FF))
    texts += ["".join(chr(rng.choice(rng.choice(ranges))) for _ in range(rng.randint(1, 20))) for _ in range(count)]
    return [*texts, Path(__file__).read_text(encoding="utf-8")]


def test_grok1_equals_the_goldens(grok1):
    tokenizer = load(grok1)
    for case in GROK1["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert tokenizer.convert_ids_to_tokens(list(range(16))) == GROK1["pieces0_16"]
    assert len(tokenizer) == GROK1["vocab_size"]
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == tuple(GROK1["special"].values())
    assert tokenizer.decode([1, 422, 3033, 2], skip_special_tokens=True) == "The answer"


def test_grok1_equals_sentencepiece_on_any_text(grok1):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(GROK1_MODEL))
    tokenizer = Tokenizer.from_file(str(grok1 / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    pieces = [oracle.id_to_piece(number).replace("\u2581", " ") for number in range(4, 131072)]
    for text in random_texts(pieces, 2000):
        ids = oracle.encode(text)
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == oracle.decode(ids), text


def test_grok2_equals_the_goldens(grok2):
    tokenizer = load(grok2)
    for case in GROK2["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    for token, number in GROK2["special"].items():
        assert tokenizer.encode(token) == [number]
        assert tokenizer.decode([number]) == token
        assert tokenizer.decode([number], skip_special_tokens=True) == ""


def test_grok2_chats_are_rendered_and_encoded_as_in_the_goldens(grok2):
    tokenizer = load(grok2)
    chat = GROK2["chat"]
    rendered = tokenizer.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True)
    assert rendered == chat["rendered"]
    assert tokenizer.encode(rendered) == chat["ids"]
    without = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
    assert without + "Assistant:" == rendered


def test_grok2_stops_at_eos_and_separator(grok2):
    generation = json.loads((grok2 / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [GROK2["special"]["<|eos|>"], GROK2["special"]["<|separator|>"]] == [2, 1]
    assert load(grok2).eos_token_id == 2


@pytest.mark.parametrize("text", ["The answer to life", "hello\n\nworld  two  spaces", "日本語 ñ 🙂 x", "it's 12345"])
@pytest.mark.parametrize("num_prompt_tokens", [0, 1, 3])
def test_text_that_is_streamed_token_by_token_keeps_its_spaces(grok1, text, num_prompt_tokens):
    tokenizer = Tokenizer.from_file(str(grok1 / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    prompt, answer = ids[:num_prompt_tokens], ids[num_prompt_tokens:]
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    streamed = "".join(stream.step(tokenizer, token) or "" for token in answer)
    assert tokenizer.decode(prompt) + streamed == text


def tiktoken_encoding(document: dict) -> tiktoken.Encoding:
    regular, special = (
        {bytes(entry["bytes"]): entry["token"] for entry in document[kind]}
        for kind in ("regular_tokens", "special_tokens")
    )
    return tiktoken.Encoding(
        "grok-2",
        pat_str=GROK2["pattern"],
        mergeable_ranks=regular,
        special_tokens={token.decode(): number for token, number in special.items()},
        explicit_n_vocab=document["vocab_size"],
    )


def tok_json(**changes) -> dict:
    return json.loads(GROK2_FILE.read_text(encoding="utf-8")) | changes


def larger_tok_json() -> dict:
    """Grok-1's pieces as a byte-level vocabulary of Grok-2's size and form."""
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(GROK1_MODEL))
    words = (oracle.id_to_piece(number).replace("\u2581", " ").encode() for number in range(325, 131072))
    document = tok_json()
    known = {bytes(entry["bytes"]) for entry in document["regular_tokens"]}
    new = dict.fromkeys(word for word in words if word not in known)
    document["regular_tokens"] += [
        {"bytes": list(word), "token": number} for number, word in enumerate(new, start=document["vocab_size"])
    ]
    return document | {"vocab_size": document["vocab_size"] + len(new)}


@pytest.mark.parametrize("document", [tok_json(), larger_tok_json()], ids=["tiny", "large"])
def test_grok2_equals_tiktoken_on_any_text(tmp_path, document):
    source = tmp_path / "tokenizer.tok.json"
    source.write_text(json.dumps(document))
    write_grok2(source, tmp_path / "converted")
    tokenizer = Tokenizer.from_file(str(tmp_path / "converted/tokenizer.json"))
    oracle = tiktoken_encoding(document)
    pieces = [bytes(entry["bytes"]).decode("utf-8", "replace") for entry in document["regular_tokens"]]
    for text in random_texts([*pieces, *GROK2["special"]], 1000):
        ids = oracle.encode(text, allowed_special="all")
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def entries(*tokens: tuple[bytes, int]) -> list[dict]:
    return [{"bytes": list(token), "token": number} for token, number in tokens]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a tokenizer.tok.json"),
        ("[]", "not a tokenizer.tok.json"),
        (json.dumps({"regular_tokens": [{"bytes": [999], "token": 1}]}), "not a tokenizer.tok.json"),
        (json.dumps(tok_json(word_split="V2")), "word_split is 'V2'"),
        (json.dumps(tok_json(pat_str="(")), "pat_str is no pattern"),
        (json.dumps(tok_json(pat_str=["a"])), "pat_str is no pattern"),
        (json.dumps(tok_json(vocab_size=511)), "not a number below vocab_size, 511"),
        (json.dumps(tok_json(regular_tokens=entries((b"a", 300)))), "no token for byte 0, byte 1"),
        (json.dumps(tok_json(special_tokens=entries((b"<|eos|>", 2)))), r"no token for <\|pad\|>, <\|separator\|>"),
        (json.dumps(tok_json(special_tokens=entries((b"<|eos|>", 9)))), "the same id"),
        (
            json.dumps(tok_json(special_tokens=[*tok_json()["special_tokens"], *entries((b"A", 600))], vocab_size=601)),
            "A",
        ),
    ],
)
def test_broken_tok_json_is_refused_by_name(tmp_path, text, words):
    source = tmp_path / "tokenizer.tok.json"
    source.write_text(text)
    with pytest.raises(CheckpointError, match=words) as raised:
        write_grok2(source, tmp_path / "converted")
    assert str(source) in str(raised.value)


def test_other_sentencepiece_models_are_refused_by_name(tmp_path):
    source = tmp_path / "tokenizer.model"
    for content in (b"", b"\xff" * 40, GROK1_MODEL.read_bytes()[:1_000_001]):
        source.write_bytes(content)
        with pytest.raises(CheckpointError, match=str(source)):
            write_grok1(source, tmp_path / "converted")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/switchyard/tokenizers"


def test_a_file_is_converted_once_and_leaves_nothing_else(cache):
    first = converted_tokenizer(GROK2_FILE)
    (first / "mark").touch()
    assert converted_tokenizer(GROK2_FILE) == first and (first / "mark").exists()
    assert list(cache.iterdir()) == [first]
    copied, original = (json.loads((folder / "config.json").read_text()) for folder in (first, GROK2_FOLDER))
    assert copied == original | {"transformers_version": "5.0.0"}


def test_a_broken_file_leaves_nothing_in_the_cache(cache, tmp_path):
    broken = tmp_path / "tokenizer.tok.json"
    broken.write_text("{")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        converted_tokenizer(broken)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        converted_tokenizer(GROK2_FILE)


def model_folder(folder: Path, architecture: str, *files: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    for name in files:
        (folder / name).write_text("{}")
    return folder


def test_vllm_gets_the_converted_tokenizer_of_a_grok(cache, tmp_path):
    arguments = tokenizer_args(GROK2_FOLDER)
    assert arguments["tokenizer"] == arguments["generation_config"] == str(converted_tokenizer(GROK2_FILE))
    own = model_folder(tmp_path / "own", "Grok1ForCausalLM", "generation_config.json")
    (own / "tokenizer.tok.json").write_bytes(GROK2_FILE.read_bytes())
    assert set(tokenizer_args(own)) == {"tokenizer"}
    grok1 = model_folder(tmp_path / "grok1", "Grok1ForCausalLM")
    (grok1 / "tokenizer.model").write_bytes(GROK1_MODEL.read_bytes())
    assert tokenizer_args(grok1) == {"tokenizer": str(converted_tokenizer(grok1 / "tokenizer.model"))}
    assert has_tokenizer(str(grok1))


def test_vllm_finds_the_others_by_itself(tmp_path):
    for number, (architecture, name) in enumerate(
        [("Grok1ForCausalLM", "tokenizer.json"), ("MixtralForCausalLM", "tokenizer.model"), ("X", "tekken.json")]
    ):
        folder = model_folder(tmp_path / str(number), architecture, name)
        assert tokenizer_args(folder) == {}
        assert find_tokenizer(folder) == folder / name
    assert tokenizer_args("some/model") == {}


@pytest.mark.parametrize("architecture", ["Grok1ForCausalLM", "MixtralForCausalLM"])
def test_without_a_tokenizer_prompts_are_token_ids(tmp_path, architecture):
    folder = model_folder(tmp_path / "bare", architecture)
    assert tokenizer_args(folder) == {"skip_tokenizer_init": True}
    assert not has_tokenizer(str(folder))
