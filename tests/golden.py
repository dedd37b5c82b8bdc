"""Golden files: prompts, logits of every position and greedy continuations of an independent implementation.

A first difference of the greedy tokens is excused only where the golden itself is nearly tied; prompt log-probabilities
are compared as such.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
NEAR_TIE = 0.002


@dataclass(frozen=True)
class Case:
    """One prompt: logits_TV float32 of its positions, greedy token ids, and the logits each was chosen from."""

    prompt: list[int]
    logits_TV: np.ndarray  # noqa: N815
    greedy: list[int]
    greedy_logits_GV: np.ndarray  # noqa: N815


def load(name: str, golden: str = "golden.npz") -> list[Case]:
    """The cases of tests/goldens/<name>/<golden>."""
    folder = GOLDENS / name
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    prompts = manifest["goldens"][golden]["prompts"] if "goldens" in manifest else manifest["prompts"]
    with np.load(folder / golden) as arrays:
        return [
            Case(
                prompt["prompt"],
                arrays[f"logits_{i}"],
                arrays[f"greedy_tokens_{i}"].tolist(),
                arrays[f"greedy_logits_{i}"],
            )
            for i, prompt in enumerate(prompts)
        ]


def config(name: str) -> dict:
    """The configuration the golden's manifest records."""
    return json.loads((GOLDENS / name / "manifest.json").read_text(encoding="utf-8"))["config"]


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """Log-probabilities [T, V] in float64."""
    shifted = logits_TV.astype(np.float64) - logits_TV.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare_greedy(case: Case, tokens: list[int]) -> int:
    """Number of equal leading tokens. Raises AssertionError at a difference that is no near tie."""
    same = next((i for i, (a, b) in enumerate(zip(tokens, case.greedy, strict=False)) if a != b), len(case.greedy))
    if same < len(case.greedy):
        best = np.sort(case.greedy_logits_GV[same])[-2:]
        margin = float(best[1] - best[0])
        assert margin <= NEAR_TIE, (
            f"token {same} is {tokens[same : same + 1]}, golden {case.greedy[same]}, margin {margin}"
        )
    return same


def prompt_logprob_difference(case: Case, prompt_logprobs: list) -> float:
    """Largest |difference| over vLLM's prompt_logprobs: a list whose entry i maps token -> log-probability at i.

    The first entry is None. Values may be floats or objects with `.logprob`.
    """
    golden_TV = log_softmax(case.logits_TV)
    assert len(prompt_logprobs) == len(case.prompt)
    worst = 0.0
    for position, entry in enumerate(prompt_logprobs[1:]):
        assert case.prompt[position + 1] in entry
        for token, value in entry.items():
            found = float(getattr(value, "logprob", value))
            worst = max(worst, abs(found - golden_TV[position, token]))
    return worst
