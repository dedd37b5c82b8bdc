"""Settings: one frozen tree, parsed once, with messages that say what to write instead."""

import dataclasses

import pytest

from cluster.config import Settings, parse_settings, setting_names, to_args
from cluster.errors import ConfigError


def test_defaults_need_only_a_model():
    settings = parse_settings({"model": "/models/demo"})
    assert settings == Settings(model="/models/demo")
    assert settings.name == "demo"
    assert settings.engine.max_num_batched_tokens == 2048


def test_nested_values_arrive_with_their_types():
    settings = parse_settings(
        {"model": "m/", "dtype": "float32", "expert_timeout_s": 5, "engine": {"kv_cache_gib": 2, "vllm": {"seed": 1}}}
    )
    assert settings.expert_timeout_s == 5.0
    assert isinstance(settings.expert_timeout_s, float)
    assert settings.engine.kv_cache_gib == 2.0
    assert settings.engine.vllm == {"seed": 1}
    assert settings.name == "m"


def test_settings_survive_a_round_trip_and_are_frozen():
    settings = parse_settings({"model": "m", "workers": 4, "worker": {"threads": 1}})
    assert parse_settings(to_args(settings)) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.workers = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"model": "m", "worker_count": 2}, ["worker_count", "no such setting", "worker"]),
        ({"model": "m", "replica": 2}, ["replica:", "The nearest is replicas"]),
        ({"model": "m", "max_model_len": 64}, ["max_model_len", "engine.max_model_len"]),
        ({"model": "m", "engine": {"kv_cache": 1}}, ["engine.kv_cache:", "engine.kv_cache_gib"]),
        ({"model": "m", "worker": {"thread": 1}}, ["worker.thread:", "worker.threads"]),
        ({"model": "m", "workers": "two"}, ["workers", "a whole number", "'two'"]),
        ({"model": "m", "workers": True}, ["workers", "a whole number", "true/false"]),
        ({"model": "m", "workers": 2.5}, ["workers", "a whole number"]),
        ({"model": "m", "workers": 0}, ["workers", "1 or more"]),
        ({"model": "m", "workers": None}, ["workers", "nothing"]),
        ({"model": "m", "expert_timeout_s": 0}, ["expert_timeout_s", "more than 0"]),
        ({"model": "m", "expert_timeout_s": float("nan")}, ["expert_timeout_s", "finite"]),
        ({"model": "m", "dtype": "float31"}, ["dtype", "Did you mean float32"]),
        ({"model": "m", "engine": 3}, ["engine", "a mapping of settings"]),
        ({"model": "m", "engine": {"vllm": ["seed"]}}, ["engine.vllm", "a mapping"]),
        ({"model": "m", "engine": {"enforce_eager": 1}}, ["engine.enforce_eager", "true or false"]),
        ({"model": 3}, ["model", "text"]),
        ({"model": "  "}, ["model", "empty"]),
        ({}, ["model", "missing"]),
        ([], ["args", "mapping"]),
    ],
)
def test_a_wrong_setting_is_named_and_explained(args, words):
    with pytest.raises(ConfigError) as raised:
        parse_settings(args)
    message = str(raised.value)
    assert all(word in message for word in words), message


def test_every_setting_is_documented():
    """The text under a field is its documentation; a new field without one fails here."""
    import ast
    import inspect

    import cluster.config

    tree = ast.parse(inspect.getsource(cluster.config))
    for node in ast.walk(tree):
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Settings")):
            continue
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and not ast.unparse(statement.annotation).endswith("Settings"):
                assert isinstance(following, ast.Expr), f"{node.name}.{statement.target.id} has no documentation"
    assert "engine.kv_cache_gib" in set(setting_names())
