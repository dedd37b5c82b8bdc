"""The catalog: counts against published figures and against real tensors, and what the command prints."""

import json
import math

import pytest

from cluster.errors import CheckpointError
from deployments.models import find_model, known_models, report, resolve_model
from model.expert_weights import is_expert_tensor, read_header
from model.sizes import USABLE_SHARE, ModelSizes, sizes_of
from ops.cli import main
from tests.serving import ROOT

# Parameters in billions as published (model cards, papers, xAI's announcements), and how far ours may be off.
PUBLISHED = {
    "grok-1": (314, 0.01),
    "grok-2": (270, 0.01),
    "mixtral-8x7b": (46.7, 0.002),
    "mixtral-8x22b": (141, 0.005),
    "qwen3-30b-a3b": (30.5, 0.002),
    "qwen3-235b-a22b": (235, 0.001),
    "gpt-oss-20b": (20.9, 0.002),
    "gpt-oss-120b": (116.8, 0.001),
    "deepseek-v3": (671, 0.001),
    "llama-4-scout": (109, 0.012),  # with 0.9 of the vision tower, which is not counted
    "llama-4-maverick": (400, 0.003),
}
# name -> billions active for each token, and whether the publisher counts the input embeddings
PUBLISHED_ACTIVE = {
    "mixtral-8x7b": (12.9, True),
    "mixtral-8x22b": (39, True),
    "qwen3-30b-a3b": (3.3, True),
    "qwen3-235b-a22b": (22, True),
    "gpt-oss-20b": (3.61, False),
    "gpt-oss-120b": (5.13, False),
    "deepseek-v3": (37, True),
    "llama-4-scout": (17, True),
    "llama-4-maverick": (17, True),
}
GB = 10**9


def sizes(name: str) -> ModelSizes:
    found = find_model(name).sizes
    assert found is not None
    return found


def test_the_catalog_has_every_model_and_its_source():
    models = {model.name: model for model in known_models()}
    assert set(models) == {*PUBLISHED, "grok-3"}
    for name in PUBLISHED:
        assert models[name].source.startswith("https://") and models[name].terms is not None
    assert models["grok-3"].sizes is None and models["grok-3"].note == "not yet released"


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name):
    billions, tolerance = PUBLISHED[name]
    assert sizes(name).total_params / 1e9 == pytest.approx(billions, rel=tolerance)


@pytest.mark.parametrize("name", PUBLISHED_ACTIVE)
def test_active_parameters_are_the_published_ones(name):
    billions, with_embeddings = PUBLISHED_ACTIVE[name]
    found = sizes(name)
    active = found.active_params - (0 if with_embeddings else found.embedding_params)
    assert active / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(
    "folder",
    [
        "tests/goldens/mixtral-tiny",
        "tests/goldens/qwen3moe-tiny",
        "tests/goldens/gptoss-tiny",
        "tests/goldens/grok2-tiny/unsharded",
        "model/demo/checkpoint",
    ],
)
def test_counts_are_those_of_real_tensors(folder):
    header = read_header(ROOT / folder / "model.safetensors")
    counts = {name: math.prod(entry["shape"]) for name, entry in header.items()}
    found = sizes(str(ROOT / folder))
    assert found.total_params == sum(counts.values())
    experts = found.num_moe_layers * found.num_experts * found.expert_params
    assert experts == sum(count for name, count in counts.items() if is_expert_tensor(name))
    assert found.active_params == found.total_params - experts + found.top_k * experts // found.num_experts


def test_counts_are_those_of_grok1s_files():
    folder = ROOT / "tests/goldens/grok1-m2"
    config = json.loads((folder / "manifest.json").read_text())["config"]
    files = json.loads((folder / "tensor_index.json").read_text())
    found = sizes_of({**config, "architectures": ["Grok1ForCausalLM"]})
    assert found.total_params == sum(math.prod(entry["shape"]) for entry in files)


def test_bytes_of_grok1_by_precision():
    grok1 = sizes("grok-1")
    weights = 3 * 6144 * 32768
    outputs = 2 * 32768 + 6144
    groups = 2 * 32768 * 6144 // 128 + 6144 * 32768 // 128
    assert grok1.expert_bytes("bf16") == 2 * weights
    assert grok1.expert_bytes("int8") == weights + 2 * outputs
    assert grok1.expert_bytes("int4") == weights // 2 + 2 * groups
    assert grok1.layer_expert_bytes("int8") == 8 * grok1.expert_bytes("int8")
    assert grok1.all_expert_bytes("int8") == 64 * grok1.layer_expert_bytes("int8")
    assert grok1.kv_bytes_per_token == 2 * 64 * 2 * 8 * 128
    with pytest.raises(ValueError, match="not one of bf16, int8, int4"):
        grok1.expert_bytes("fp8")


def test_latent_attention_keeps_one_vector_for_each_token_and_layer():
    assert sizes("deepseek-v3").kv_bytes_per_token == 2 * 61 * (512 + 64)


def test_groups_that_do_not_divide_the_inputs_are_rounded_up():
    oss = sizes("gpt-oss-20b")
    assert oss.expert_bytes("int4") == 3 * (2880 * 1440 + 2880 * 23 * 2) + 2 * 3 * 2880


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("gb", [24, 80, 141])
def test_workers_hold_their_share_and_one_fewer_would_not(name, precision, gb):
    found = sizes(name)
    room = gb * GB * USABLE_SHARE
    of_every_layer = found.num_moe_layers * found.expert_bytes(precision)

    def fits(count: int) -> bool:
        return math.ceil(found.num_experts / count) * of_every_layer <= room

    count = found.num_workers(gb * GB, precision)
    if count <= found.num_experts:
        assert fits(count) and (count == 1 or not fits(count - 1))
    else:
        assert not fits(found.num_experts)
        pairs = found.num_moe_layers * found.num_experts
        assert math.ceil(pairs / count) * found.expert_bytes(precision) <= room


def test_an_expert_that_fits_nowhere():
    assert sizes("grok-1").num_workers(0.1 * GB, "bf16") == 0


def test_a_dense_config_and_a_broken_one_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        find_model(str(tmp_path))
    config = tmp_path / "config.json"
    for text, words in [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"model_type": "llama"}', "model_type llama is not one whose sizes are known"),
        ('{"model_type": "mixtral", "hidden_size": 8}', "lacks num_experts"),
        ('{"architectures": ["Grok1ForCausalLM"]}', "lacks hidden_size"),
        ('{"model_type": "mixtral", "hidden_size": "wide", "num_experts": 8}', "config.json: the config of this"),
    ]:
        config.write_text(text)
        with pytest.raises(CheckpointError, match=words) as raised:
            find_model(str(tmp_path))
        assert str(config) in str(raised.value)


def test_the_command_lists_the_catalog(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *(model.name for model in known_models())]
    assert len({len(line) for line in lines if "grok-3" not in line}) == 1
    grok1 = next(line for line in lines if line.startswith("grok-1"))
    assert all(words in grok1 for words in ("315.7B", "83.8B", "8 top 2", "618.5", "309.3", "159.5", "31*/9*/8"))
    assert next(line for line in lines if line.startswith("grok-3")).endswith("not yet released")


def test_the_command_describes_one_model_or_folder(capsys):
    assert main(["models", "Grok-2"]) == 0
    assert "Grok 2 Community License" in capsys.readouterr().out
    assert main(["models", "grok-3"]) == 0
    assert capsys.readouterr().out == "Grok-3: not yet released\n"
    assert main(["models", "demo"]) == 0
    assert "demo: 16.3M parameters" in capsys.readouterr().out
    assert main(["models", "grok-4"]) == 2
    assert "The nearest name is grok-" in capsys.readouterr().err


def test_the_command_prints_json(capsys):
    assert main(["models", "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert reports == [report(model) for model in known_models()]
    assert main(["models", str(resolve_model("demo")), "--json"]) == 0
    demo = json.loads(capsys.readouterr().out)
    assert demo["experts"] == 8 and demo["licence"] == "Apache-2.0"
    assert demo["expert_bytes"]["bf16"]["workers"] == {"24": 1, "80": 1, "141": 1}
