"""Grok in vLLM (colocated, float32, CPU) against the golden files and an independent reference.

One engine per model.
"""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from model.grok_checkpoint import convert_ckpt0
from model.tokenizer_files import tokenizer_args
from tests import golden
from tests.reference_grok import ReferenceGrok, load_folder, random_weights

pytestmark = pytest.mark.timeout(600)

LOGPROB_TOLERANCE = 2e-3
GATE_TIE = 2e-5
TOKEN_TIE = 2e-3

GROK1_ODD = {
    "architectures": ["Grok1ForCausalLM"],  # no model_type: the architecture is enough
    "vocab_size": 300,
    "hidden_size": 160,
    "intermediate_size": 136,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attn_logit_softcapping": 30.0,
    "attn_output_multiplier": 0.1,
    "embedding_multiplier_scale": 10.0,
    "output_multiplier_scale": 0.5773502691896257,
}
GROK2_ODD = GROK1_ODD | {
    "model_type": "git",
    "vocab_size": 390,
    "hidden_size": 96,
    "intermediate_size": 200,
    "moe_intermediate_size": 72,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 80,
    "num_local_experts": 8,
    "residual_moe": True,
    "router_logit_softcapping": 30.0,
    "final_logit_softcapping": 10,
    "attn_logit_softcapping": 3.0,  # small, so that cap and temperature cannot be swapped unnoticed
    "attn_temperature_len": 17,
    "rope_theta": 208533496,
    "rope_type": "original",
    "embedding_multiplier_scale": 4.0,
    "output_multiplier_scale": 0.5,
    "sliding_window_size": -1,
}


@contextmanager
def engine(folder: Path, **args: Any) -> Iterator[Any]:
    """A vLLM engine of its own processes, shut down at the end."""
    from vllm import LLM

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    llm = LLM(
        str(folder),
        **{
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 16,
            "max_logprobs": -1,
            "enable_prefix_caching": False,
            **tokenizer_args(folder),
            **args,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generate(llm: Any, prompts: list[list[int]], count: int) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, prompt_logprobs=-1, detokenize=False)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def check_goldens(llm: Any, cases: list[golden.Case]) -> None:
    for case, output in zip(cases, generate(llm, [case.prompt for case in cases], 24), strict=True):
        same = golden.compare_greedy(case, list(output.outputs[0].token_ids))
        difference = golden.prompt_logprob_difference(case, output.prompt_logprobs)
        print(f"prompt of {len(case.prompt)}: {same} greedy tokens, prompt_logprobs differ by {difference:.1e}")
        assert difference < LOGPROB_TOLERANCE


def check_reference(llm: Any, reference: ReferenceGrok, prompts: list[list[int]], count: int) -> None:
    """All prompts as one batch; positions behind a near-tied gate are left out, at most half of them all."""
    compared = total = 0
    largest = 0.0
    for prompt, output in zip(prompts, generate(llm, prompts, count), strict=True):
        tokens = list(output.outputs[0].token_ids)
        logits_TV = reference.forward(prompt + tokens).numpy()
        tied = np.flatnonzero(reference.gate_margins_T.numpy() < GATE_TIE)
        sure = int(tied[0]) if len(tied) else len(logits_TV)
        expected_TV = golden.log_softmax(logits_TV)
        for position, entry in enumerate(output.prompt_logprobs[1:][:sure]):
            found = {token: value.logprob for token, value in entry.items()}
            worst = max(abs(found[token] - expected_TV[position, token]) for token in found)
            assert worst < LOGPROB_TOLERANCE, f"position {position} of {len(prompt)}: {worst}"
            largest = max(largest, worst)
        for position in range(len(prompt) - 1, min(sure, len(logits_TV) - 1)):
            chosen = tokens[position + 1 - len(prompt)]
            short = float(logits_TV[position].max() - logits_TV[position, chosen])
            assert short <= TOKEN_TIE, f"token {position + 1} of prompt {len(prompt)}"
        compared, total = compared + min(sure, len(logits_TV)), total + len(logits_TV)
    assert compared >= total / 2
    print(f"compared {compared} of {total} positions, largest difference {largest:.1e}")


def random_model(folder: Path, config: dict, seed: int) -> ReferenceGrok:
    weights = random_weights(config, seed)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return ReferenceGrok(config, weights)


def random_prompts(vocab_size: int, lengths: list[int], seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(1, vocab_size, length).tolist() for length in lengths]


def test_reference_equals_goldens(tmp_path: Path) -> None:
    convert_ckpt0(golden.GOLDENS / "grok1-m2/int8/ckpt-0", tmp_path, exact=True, config=golden.config("grok1-m2"))
    pairs = [
        (tmp_path, golden.load("grok1-m2", "golden_f32_exactdeq.npz")),
        (golden.GOLDENS / "grok2-tiny/unsharded", golden.load("grok2-tiny")),
    ]
    for folder, cases in pairs:
        reference = ReferenceGrok(*load_folder(folder))
        for case in cases:
            assert np.abs(reference.forward(case.prompt).numpy() - case.logits_TV).max() < LOGPROB_TOLERANCE


@pytest.mark.usefixtures("nursery")
def test_grok1_m2(tmp_path: Path) -> None:
    convert_ckpt0(golden.GOLDENS / "grok1-m2/int8/ckpt-0", tmp_path, config=golden.config("grok1-m2"))
    with engine(tmp_path, max_model_len=256) as llm:  # compiled
        check_goldens(llm, golden.load("grok1-m2"))


@pytest.mark.usefixtures("nursery")
def test_grok2_tiny() -> None:
    """attn_temperature_len is 40: chunks of 48 tokens cross it, and decoding does for the shorter prompts."""
    folder = golden.GOLDENS / "grok2-tiny/unsharded"
    with engine(folder, max_num_batched_tokens=48) as llm:  # compiled
        check_goldens(llm, golden.load("grok2-tiny"))
        reference = ReferenceGrok(*load_folder(folder))
        check_reference(llm, reference, random_prompts(512, [1, 39, 40, 41, 42, 45, 130, 300], seed=5), 8)


@pytest.mark.usefixtures("nursery")
def test_grok1_of_odd_shape(tmp_path: Path) -> None:
    reference = random_model(tmp_path, GROK1_ODD, seed=11)
    with engine(tmp_path, enforce_eager=True) as llm:
        check_reference(llm, reference, random_prompts(300, [1, 7, 33, 64, 90], seed=1), 8)


@pytest.mark.usefixtures("nursery")
def test_grok2_of_odd_shape(tmp_path: Path) -> None:
    """Far past a temperature length of 17, in chunks of 32 tokens shared by prompts and decoding sequences."""
    reference = random_model(tmp_path, GROK2_ODD, seed=12)
    prompts = random_prompts(390, [1, 12, 16, 17, 18, 19, 25, 60, 140], seed=2)
    with engine(tmp_path, enforce_eager=True, max_num_batched_tokens=32) as llm:
        check_reference(llm, reference, prompts, 10)


def test_config_is_chosen_by_architecture(tmp_path: Path) -> None:
    """The released Grok-2 config loads as it lies, and a real GIT model keeps its own class."""
    from transformers import GitConfig
    from vllm.transformers_utils.config import get_config

    from model.grok import register

    register()
    register()
    grok = get_config(golden.GOLDENS / "grok2-tiny/unsharded", trust_remote_code=False)
    assert grok.spec.is_grok2
    assert grok.spec.temperature_len == 40
    assert grok.rope_parameters == {"rope_type": "default", "rope_theta": 208533496}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "git", "architectures": ["GitForCausalLM"]}))
    assert isinstance(get_config(tmp_path, trust_remote_code=False), GitConfig)
