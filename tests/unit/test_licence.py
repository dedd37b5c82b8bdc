"""Which terms a checkpoint has, what serving it takes, and that its attribution is shown."""

import asyncio
import json
from pathlib import Path

import pytest

from cluster.config import parse_settings
from cluster.errors import CheckpointError, ConfigError, LicenceNotAccepted
from deployments.attribution import HEADER, Attributed, with_attribution
from deployments.models import attribution_of, check_licence, describe_licence, resolve_model
from model.licence import APACHE2, GROK2, MIT, UNKNOWN_TEXT, UNSTATED, licence_of, terms_of_name, terms_of_text
from ops import serve
from ops.cli import main
from tests.serving import ROOT

GROK2_TEXT = "# Grok 2 Community License Agreement\n\n**Last Updated:** some day\nxAI grants you ...\n"
APACHE_TEXT = "                  Apache License\n            Version 2.0, January 2004\n"
MIT_TEXT = "Permission is hereby granted, free of charge, to any person obtaining\na copy of this software"
RELEASED_GROK2 = {
    "architectures": ["Grok1ForCausalLM"],
    "model_type": "git",
    "vocab_size": 131072,
    "hidden_size": 8192,
    "intermediate_size": 32768,
    "moe_intermediate_size": 16384,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "residual_moe": True,
}
RELEASED_GROK1 = {
    **RELEASED_GROK2,
    "hidden_size": 6144,
    "intermediate_size": 32768,
    "moe_intermediate_size": None,
    "num_attention_heads": 48,
    "residual_moe": False,
}


def checkpoint(folder: Path, config: dict | None = None, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("config", "files", "terms"),
    [
        (RELEASED_GROK2, {}, GROK2),
        (RELEASED_GROK2 | {"vocab_size": 131100}, {}, GROK2),
        (RELEASED_GROK2 | {"num_hidden_layers": 1}, {}, UNSTATED),
        (RELEASED_GROK2, {"LICENSE": APACHE_TEXT}, APACHE2),
        (RELEASED_GROK2, {"README__md": "---\nlicense: apache-2.0\n---\n"}, GROK2),
        (RELEASED_GROK1, {}, APACHE2),
        (RELEASED_GROK1, {"LICENSE__txt": GROK2_TEXT}, GROK2),
        ({"architectures": ["MixtralForCausalLM"]}, {}, UNSTATED),
        ({"architectures": ["MixtralForCausalLM"]}, {"LICENSE": APACHE_TEXT, "LICENCE__md": GROK2_TEXT}, GROK2),
        ({"architectures": ["MixtralForCausalLM"]}, {"LICENSE": "Our own words."}, UNKNOWN_TEXT),
        (None, {"README__md": "---\ntags: [moe]\nlicense: other\nlicense_name: grok-2\n---\n# Card"}, GROK2),
        (None, {"README__md": '---\r\nlicense: "mit"\r\n---\r\n'}, MIT),
        (None, {"README__md": "license: mit\n"}, UNSTATED),
        (None, {"LICENSE": MIT_TEXT, "LICENSE-MODEL": APACHE_TEXT}, APACHE2),
        (None, {"LICENSE-CODE": MIT_TEXT}, UNSTATED),
        (None, {}, UNSTATED),
    ],
)
def test_the_folder_decides(tmp_path, config, files, terms):
    assert licence_of(checkpoint(tmp_path, config, **files)).terms == terms


def test_reworded_terms_beside_the_released_weights_still_have_to_be_accepted(tmp_path):
    folder = checkpoint(tmp_path, RELEASED_GROK2, LICENSE="Terms that nobody here has seen.")
    terms = licence_of(folder).terms
    assert terms.name == UNKNOWN_TEXT.name
    assert terms.must_accept and terms.attribution == "Powered by xAI"


def test_broken_configs_and_folders_decide_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert licence_of(tmp_path).terms == UNSTATED
    (tmp_path / "config.json").write_text('{"architectures": ["Grok1ForCausalLM"], "vocab_size": []}')
    assert licence_of(tmp_path).terms == UNSTATED
    assert licence_of(tmp_path / "missing").terms == UNSTATED


def test_a_licence_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, RELEASED_GROK2, LICENSE=GROK2_TEXT)

    def refuse(path: Path, mode: str):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: json.dumps(RELEASED_GROK2))
    with pytest.raises(CheckpointError, match="LICENSE, which decides the licence: Permission denied"):
        licence_of(folder)


def test_the_release_of_grok1_is_known_by_its_files(tmp_path):
    for number in range(769):
        (tmp_path / f"tensor{number:05d}_000").touch()
    assert licence_of(tmp_path).terms == UNSTATED
    (tmp_path / "tensor00769_000").touch()
    assert licence_of(tmp_path).terms == APACHE2


def test_texts_and_names():
    assert terms_of_text("the *xAI*\nCommunity Licence") == GROK2
    assert terms_of_text(MIT_TEXT) == MIT
    assert terms_of_text((ROOT / "LICENSE").read_text()) == APACHE2
    assert terms_of_name("Grok_2 Community License") == GROK2
    assert terms_of_name("llama4").name == "llama4"
    assert not terms_of_name("llama4").must_accept


@pytest.mark.parametrize("name", ["grok2-tiny/unsharded", "mixtral-tiny", "qwen3moe-tiny", "gptoss-tiny"])
def test_random_checkpoints_need_no_acceptance(name):
    check_licence(parse_settings({"model": str(ROOT / "tests/goldens" / name)}))


def test_the_demo_model_is_apache_and_needs_no_acceptance():
    demo = resolve_model("demo")
    assert licence_of(demo).terms == APACHE2
    assert attribution_of(str(demo)) is None
    check_licence(parse_settings({"model": str(demo)}))
    template = (ROOT / "model/demo/card_template.md").read_text()
    assert template.startswith("---\nlicense: apache-2.0\n---\n")


def test_grok2_is_served_only_when_accepted(tmp_path):
    folder = str(checkpoint(tmp_path, RELEASED_GROK2))
    with pytest.raises(LicenceNotAccepted) as raised:
        check_licence(parse_settings({"model": folder}))
    for words in ("Grok 2 Community License", "US$1 million", f"switchyard license {folder}", "--accept-license"):
        assert words in str(raised.value)
    check_licence(parse_settings({"model": folder, "license": "accepted"}))
    assert attribution_of(folder) == "Powered by xAI"


@pytest.mark.parametrize("value", ["accept", "yes", True, "Accepted"])
def test_only_the_word_accepted_accepts(value):
    with pytest.raises(ConfigError, match="license:"):
        parse_settings({"model": "m", "license": value})


def test_accept_license_on_the_command_line(tmp_path, monkeypatch):
    import argparse

    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert serve.configure(parser.parse_args(["--accept-license"])).args["license"] == "accepted"
    assert "license" not in serve.configure(parser.parse_args([])).args


def test_the_command_prints_terms_and_file(tmp_path, capsys):
    assert main(["license", str(checkpoint(tmp_path, RELEASED_GROK2, LICENSE=GROK2_TEXT))]) == 0
    words = capsys.readouterr().out
    assert "Grok 2 Community License\n" in words and "license: accepted" in words and "Powered by xAI" in words
    assert f"---- {tmp_path}/LICENSE ----\n{GROK2_TEXT.rstrip()}\n" in words
    assert main(["license", "demo"]) == 0
    assert "Apache-2.0" in capsys.readouterr().out
    assert main(["license", str(tmp_path / "missing")]) == 2
    assert "neither a known model nor a folder" in capsys.readouterr().err
    assert describe_licence(str(ROOT / "tests/goldens/grok2-tiny/unsharded")).endswith("published the weights.")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("grok-1", "Apache-2.0"),
        ("Grok-2", "Powered by xAI"),
        ("grok-3", "not yet released"),
        ("deepseek-v3", "DeepSeek Model License"),
    ],
)
def test_the_command_knows_the_catalog(name, words):
    assert words in describe_licence(name)


MODELS = b'{"object":"list","data":[{"id":"grok-2"},{"id":"adapter"}]}'


def get(attribution: str | None, path: str = "/v1/models", parts: tuple[bytes, ...] = (MODELS,)):
    """Headers and body of a GET; the app answers with `parts`."""
    sent = []

    async def app(scope, receive, send):
        length = str(sum(map(len, parts))).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Length", length)]})
        for number, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts) - 1})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    asyncio.run(Attributed(app, attribution)(scope, None, send))
    headers = {name.lower().decode(): value.decode() for name, value in sent[0]["headers"]}
    return headers, [message["body"] for message in sent[1:]]


def test_every_response_carries_the_attribution():
    headers, body = get("Powered by xAI", "/v1/completions", (b"data: 1\n\n", b"data: 2\n\n"))
    assert headers[HEADER] == "Powered by xAI"
    assert body == [b"data: 1\n\n", b"data: 2\n\n"]  # as it came: streaming is not held back


@pytest.mark.parametrize("path", ["/v1/models", "/prefix/v1/models/"])
def test_the_models_carry_it_too(path):
    headers, (body,) = get("Powered by xAI", path, (MODELS[:20], MODELS[20:]))
    assert [model["attribution"] for model in json.loads(body)["data"]] == ["Powered by xAI"] * 2
    assert headers["content-length"] == str(len(body)) and headers[HEADER] == "Powered by xAI"


def test_without_attribution_nothing_changes():
    headers, body = get(None)
    assert HEADER not in headers and body == [MODELS]


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b'{"error":{}}', b'{"data":[1]}'])
def test_bodies_of_another_shape_pass(body):
    assert with_attribution(body, "x") == body


def test_other_scopes_pass():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(Attributed(app, "x")({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]
