"""Greedy tokens over HTTP, prompts as token ids, float32, equal those of independent implementations.

Each row is one start of an application on the same Ray.
"""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.grok_checkpoint import convert_ckpt0
from ops.cli import main
from tests import golden
from tests.serving import Serving

pytestmark = pytest.mark.timeout(600)

PROMPT_LOGPROB_TOLERANCE = 2e-3
_PACKED = ("_packed", "_scale", "_shape")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the models lie: Grok-1 converted with its released int8 experts, Grok-2 as released, in eight parts."""
    grok1 = tmp_path_factory.mktemp("grok1") / "grok1-m2"
    convert_ckpt0(golden.GOLDENS / "grok1-m2/int8/ckpt-0", grok1, config=golden.config("grok1-m2"), experts="int8")
    grok2 = tmp_path_factory.mktemp("grok2") / "grok2-tiny"
    grok2.mkdir()
    for path in (golden.GOLDENS / "grok2-tiny/tp8").iterdir():
        (grok2 / path.name).symlink_to(path)
    (grok2 / "LICENSE").write_text("Grok 2 Community License Agreement", encoding="utf-8")
    others = {name: golden.GOLDENS / name for name in ("mixtral-tiny", "qwen3moe-tiny", "gptoss-tiny")}
    return {"grok1-m2": grok1, "grok2-tiny": grok2, **others}


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("mixtral-tiny", 4),
        ("qwen3moe-tiny", 2),
        ("gptoss-tiny", 2),
        ("grok2-tiny", 2),
        ("grok1-m2", 2),
    ],
)
def test_greedy_tokens_equal_the_goldens(serving: Serving, folders: dict[str, Path], name: str, workers: int) -> None:
    serving.deploy(
        {
            "model": str(folders[name]),
            "served_model_name": name,
            "license": "accepted",
            "dtype": "float32",
            "workers": workers,
            "engine": {"kv_cache_gib": 0.25, "enforce_eager": True},
        }
    )
    assert len(serving.ask("status")["table"]["replicas"]) == workers
    check_goldens(serving, name)
    if name == "grok2-tiny":
        check_text_and_attribution(serving)


def check_goldens(serving: Serving, name: str) -> None:
    """What is served under that name answers as its golden says, Grok with the golden's prompt_logprobs."""
    for case in golden.load(name):
        choice = complete(serving, name, case)
        golden.compare_greedy(case, choice["token_ids"])
        if name.startswith("grok"):
            found = [by_token(entry) for entry in choice["prompt_logprobs"]]
            assert golden.prompt_logprob_difference(case, found) < PROMPT_LOGPROB_TOLERANCE


def check_text_and_attribution(serving: Serving) -> None:
    """Grok-2's own tokenizer file, chat template and stop tokens, and what its licence asks to be shown."""
    tokenizer = json.loads((golden.GOLDENS / "grok2-tiny/tokenizer_golden.json").read_text(encoding="utf-8"))
    for case in tokenizer["encode"]:
        asked = {"model": "grok2-tiny", "prompt": case["text"], "add_special_tokens": False}
        assert post(serving, "/tokenize", asked)["tokens"] == case["ids"]
    chat = {"model": "grok2-tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}
    assert post(serving, "/v1/chat/completions", chat)["usage"]["completion_tokens"] > 0
    with urllib.request.urlopen(f"{serving.url}/v1/models", timeout=60) as response:
        assert response.headers["x-model-attribution"] == "Powered by xAI"
        assert json.load(response)["data"][0]["attribution"] == "Powered by xAI"


def post(serving: Serving, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        serving.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_a_dense_model_is_served_without_workers(serving: Serving, tmp_path: Path) -> None:
    """Compared with Transformers' own greedy tokens of the same random Llama, which comes without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
    )
    dense = LlamaForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    serving.deploy(
        {
            "model": str(tmp_path / "dense"),
            "dtype": "float32",
            "engine": {"kv_cache_gib": 0.25, "enforce_eager": True},
        }
    )
    with pytest.raises(RuntimeError, match="expert-router"):
        serving.ask("status")
    prompt = [5, 17, 99, 200]
    expected = dense.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    case = golden.Case(prompt, np.empty(0), expected[0, len(prompt) :].tolist(), np.empty(0))
    assert complete(serving, "dense", case)["token_ids"] == case.greedy


def by_token(entry: dict[str, Any] | None) -> dict[int, float] | None:
    """One position of vLLM's prompt_logprobs, whose keys are text in JSON."""
    return entry and {int(token): value["logprob"] for token, value in entry.items()}


def test_int4_experts_answer_as_their_weights_do_in_transformers(serving: Serving, tmp_path: Path) -> None:
    """Mixtral converted to int4, against Transformers' Mixtral with the weights that its files stand for."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path / "mixtral-int4"
    assert main(["convert", str(golden.GOLDENS / "mixtral-tiny"), str(folder), "--experts", "int4"]) == 0
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    mixtral = MixtralForCausalLM(MixtralConfig(**config)).eval()
    missing, unknown = mixtral.load_state_dict(_as_transformers_has_them(_multiplied_out(folder)), strict=False)
    assert not unknown and not missing
    serving.deploy(
        {
            "model": str(folder),
            "dtype": "float32",
            "workers": 2,
            "engine": {"kv_cache_gib": 0.25, "enforce_eager": True},
        }
    )
    for case in golden.load("mixtral-tiny")[:2]:
        expected = mixtral.generate(
            torch.tensor([case.prompt]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits_GV = torch.cat(expected.logits).numpy()
        int4 = golden.Case(case.prompt, np.empty(0), expected.sequences[0, len(case.prompt) :].tolist(), logits_GV)
        golden.compare_greedy(int4, complete(serving, "mixtral-int4", int4)["token_ids"])


def _multiplied_out(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, integers of 4 bits as what they stand for; none of our code reads them."""
    import torch
    from safetensors.torch import load_file

    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    tensors = {name: tensor.float() for name, tensor in stored.items() if not name.endswith(_PACKED)}
    for name in [name for name in stored if name.endswith("_packed")]:
        packed, scales = stored[name].numpy().view(np.uint32), stored[name.replace("_packed", "_scale")].float()
        nibbles = np.stack([packed >> 4 * place & 15 for place in range(8)], axis=-1).astype(np.int64) - 8
        integers = torch.from_numpy(nibbles.reshape(len(packed), -1)).float()
        group = integers.shape[1] // scales.shape[1]
        tensors[name.removesuffix("_packed")] = integers * scales.repeat_interleave(group, dim=1)
    return tensors


def _as_transformers_has_them(tensors: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 stacks experts, gate above up projection; on disk each matrix is by itself."""
    import torch

    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    moe = ".block_sparse_moe."
    for layer in sorted({name.split(moe)[0] for name in tensors if ".experts." in name}):
        experts = [
            {w: tensors[f"{layer}{moe}experts.{e}.{w}.weight"] for w in ("w1", "w2", "w3")}
            for e in range(sum(name.startswith(f"{layer}{moe}experts.") for name in tensors) // 3)
        ]
        stacked[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat((e["w1"], e["w3"])) for e in experts])
        stacked[f"{layer}.mlp.experts.down_proj"] = torch.stack([e["w2"] for e in experts])
        stacked[f"{layer}.mlp.gate.weight"] = stacked.pop(f"{layer}{moe}gate.weight")
    return stacked


def complete(serving: Serving, model: str, case: golden.Case) -> dict[str, Any]:
    """One greedy completion of the golden's length."""
    body = {
        "model": model,
        "prompt": case.prompt,
        "max_tokens": len(case.greedy),
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "prompt_logprobs": 1,
    }
    choice: dict[str, Any] = post(serving, "/v1/completions", body)["choices"][0]
    assert len(choice["token_ids"]) == len(case.greedy)
    return choice
