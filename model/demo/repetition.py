"""A penalty for loops in the model's own greedy text.

Sequence-level unlikelihood (Welleck et al. 2019, arXiv:1908.04319, section 5.2): the model continues real openings
greedily; every generated token that completes a run of `RUN` tokens seen before in its sequence costs -ln(1 - p).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.demo.network import Grok2, LayerCache

RUN = 4
PROMPT_TOKENS, NEW_TOKENS = 24, 72


@torch.no_grad()
def continue_greedily(network: Grok2, prompts_BT: Tensor, num_tokens: int) -> Tensor:
    """The prompts with `num_tokens` greedy tokens appended, [B, T + num_tokens]; stop tokens are not special here."""
    caches = [LayerCache() for _ in range(network.config.num_hidden_layers)]
    parts = [prompts_BT]
    with torch.autocast(prompts_BT.device.type, torch.bfloat16):
        for _ in range(num_tokens):
            parts.append(network(parts[-1], caches)[:, -1:].argmax(-1))
    return torch.cat(parts, 1)


def repeats(tokens_BT: Tensor, run: int = RUN) -> Tensor:
    """Bool [B, T]: whether the run of tokens that ends here occurred before in the row."""
    runs_BTR = tokens_BT.unfold(1, run, 1)
    same_BTT = (runs_BTR[:, :, None] == runs_BTR[:, None]).all(-1)
    again_BT = torch.tril(same_BTT, -1).any(-1)
    return torch.nn.functional.pad(again_BT, (run - 1, 0))


def repetition_loss(network: Grok2, openings_BT: Tensor) -> Tensor:
    """Mean over generated tokens of -ln(1 - p) where a run is repeated, 0 elsewhere."""
    tokens_BT = continue_greedily(network, openings_BT[:, :PROMPT_TOKENS], NEW_TOKENS)
    guilty_BT = repeats(tokens_BT)[:, PROMPT_TOKENS:]
    with torch.autocast(tokens_BT.device.type, torch.bfloat16):
        logits_BTV = network(tokens_BT[:, :-1])[:, PROMPT_TOKENS - 1 :]
    p_BT = torch.softmax(logits_BTV, -1).gather(-1, tokens_BT[:, PROMPT_TOKENS:, None])[..., 0]
    return -(torch.log1p(-p_BT.clamp(max=0.999)) * guilty_BT).mean()
