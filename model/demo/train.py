"""Trains the demo model from scratch.

    python -m model.demo.train --run-dir /tmp/run                      # 95 CPU-minutes, ~48 minutes on 2 cores
    python -m model.demo.train --run-dir /tmp/run --cpu-minutes 5      # a quick look
    touch /tmp/run/anneal                                             # end early, with the learning rate annealed
    python -m model.demo.card --run-dir /tmp/run --out model/demo/checkpoint   # export, measure, write the model card

The corpus is fetched from Debian packages into --cache (needs apt-get and package lists; no root). A run that was
stopped goes on from --run-dir/state.pt. The budget counts CPU time of this process, so a paused run loses nothing.
On a shared machine: nice -n 19 env OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python -m model.demo.train ...

Learning rate: linear warm-up, constant, then a linear fall to zero over the last `decay_share` of the budget ("WSD",
Hu et al. 2024, arXiv:2404.06395). During the fall come longer windows, and the penalty of repetition.py. Load balance:
E * sum_e f_e * P_e per layer (Fedus et al. 2021, arXiv:2101.03961, equation 4).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model.demo.corpus import Chapter, load_corpus
from model.demo.network import Grok2, GrokConfig, SparseMoE, softcap
from model.demo.repetition import repetition_loss
from model.demo.text import Windows, encode_chapters, train_tokenizer

CONFIG = GrokConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=320,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    embedding_multiplier_scale=16.0,  # sqrt(hidden_size), as Grok-2's
    output_multiplier_scale=0.5,
    rope_theta=10000.0,
    max_position_embeddings=1024,
)


@dataclass(frozen=True)
class Recipe:
    """Every choice of the training run."""

    seed: int = 1
    batch_rows: int = 12
    window_tokens: int = 256
    long_rows: int = 3
    long_window_tokens: int = 1024
    long_share: float = 0.35  # of the batches, in the second half of the decay
    chat_share: float = 0.1
    peak_lr: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.35
    betas: tuple[float, float] = (0.9, 0.97)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_weight: float = 0.01
    repetition_every_steps: int = 5  # during the decay
    repetition_weight: float = 1.0
    eval_every_steps: int = 150
    eval_windows: int = 48
    save_every_steps: int = 100


def initialise(network: Grok2, seed: int) -> None:
    """Normal weights, std 0.5/sqrt(fan_in); scaled embeddings of unit variance; small post-norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name.endswith("embed_tokens.weight"):
            std = 1 / network.config.embedding_multiplier_scale
        elif parameter.dim() == 2:
            std = 0.5 * parameter.shape[1] ** -0.5
        else:
            parameter.data.fill_(0.4 if ".post_" in name else 1.0)
            continue
        torch.nn.init.normal_(parameter, std=std, generator=generator)


def make_optimizer(network: Grok2, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, embeddings excepted."""
    decayed = [p for n, p in network.named_parameters() if p.dim() == 2 and "embed" not in n]
    plain = [p for n, p in network.named_parameters() if p.dim() != 2 or "embed" in n]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=recipe.betas, weight_decay=0.0, fused=True)


def balance_loss(routers: list[SparseMoE]) -> Tensor:
    """Mean over layers of E * sum_e f_e * P_e; 1 when perfectly even. f: share of choices, P: mean probability."""
    losses = []
    for moe in routers:
        experts = moe.last_probs_NE.shape[1]
        share_E = torch.bincount(moe.last_topk_NK.flatten(), minlength=experts) / moe.last_topk_NK.numel()
        losses.append(experts * (share_E * moe.last_probs_NE.mean(0)).sum())
    return torch.stack(losses).mean()


def token_loss(network: Grok2, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats; matrix products in bfloat16."""
    with torch.autocast(inputs_BT.device.type, torch.bfloat16):
        logits_BTV = network.lm_head(network.hidden(inputs_BT))
    c = network.config
    logits_BTV = softcap(logits_BTV.float() * c.output_multiplier_scale, c.final_logit_softcapping)
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


class Schedule:
    """Learning rate as a function of CPU seconds spent. A file `anneal` in run_dir starts the decay at once."""

    def __init__(self, recipe: Recipe, budget_s: float, run_dir: Path) -> None:
        self.recipe, self.flag = recipe, run_dir / "anneal"
        self.decay_start_s, self.end_s = budget_s * (1 - recipe.decay_share), budget_s
        self.forced = False

    def poll(self, spent_s: float) -> None:
        """Looks for the file; it may hold the length of the decay in CPU seconds."""
        if not self.forced and self.flag.exists() and spent_s < self.decay_start_s:
            text = self.flag.read_text().strip()
            share = self.recipe.decay_share
            self.decay_start_s, self.forced = spent_s, True
            self.end_s = spent_s + (float(text) if text else spent_s * share / (1 - share))

    def decay_progress(self, spent_s: float) -> float:
        """0 before the decay, 1 at its end."""
        return min(1.0, max(0.0, (spent_s - self.decay_start_s) / (self.end_s - self.decay_start_s)))

    def learning_rate(self, step: int, spent_s: float) -> float:
        """Of the step about to be taken."""
        warmup = min(1.0, (step + 1) / self.recipe.warmup_steps)
        return self.recipe.peak_lr * warmup * (1 - self.decay_progress(spent_s))


class Run:
    """One training run and its files in `run_dir`: state.pt (to resume), tokenizer.json, log.jsonl."""

    def __init__(self, run_dir: Path, cache: Path, budget_s: float, device: str, recipe: Recipe) -> None:
        self.run_dir, self.recipe, self.device = run_dir, recipe, device
        run_dir.mkdir(parents=True, exist_ok=True)
        train, held_out = load_corpus(cache)
        self.tokenizer = self._tokenizer(train)
        self.short = Windows(self.tokenizer, train, recipe.window_tokens, recipe.chat_share, recipe.seed)
        self.long = Windows(self.tokenizer, train, recipe.long_window_tokens, recipe.chat_share, recipe.seed)
        self.probe = self._probe(held_out)
        self.network = Grok2(CONFIG)
        initialise(self.network, recipe.seed)
        self.network.to(device)
        self.optimizer = make_optimizer(self.network, recipe)
        self.schedule = Schedule(recipe, budget_s, run_dir)
        self.step, self.tokens, self.earlier_s = 0, 0, 0.0
        if (run_dir / "state.pt").exists():
            self._restore()
        # The experts' group sizes change with every batch: compile everything but the MoE block.
        SparseMoE.forward = torch.compiler.disable(SparseMoE.forward)  # type: ignore[method-assign]
        self.loss = torch.compile(token_loss, dynamic=False)

    def _tokenizer(self, train: list[Chapter]) -> Tokenizer:
        path = self.run_dir / "tokenizer.json"
        if not path.exists():
            train_tokenizer(train, CONFIG.vocab_size).save(str(path))
        return Tokenizer.from_file(str(path))

    def _probe(self, held_out: list[Chapter]) -> tuple[Tensor, Tensor]:
        """A fixed, evenly spaced sample of held-out windows, for the loss curve."""
        stream = [token for document in encode_chapters(self.tokenizer, held_out) for token in document]
        length, count = self.recipe.window_tokens, self.recipe.eval_windows
        starts = [i * (len(stream) - length - 1) // (count - 1) for i in range(count)]
        rows = torch.tensor([stream[i : i + length + 1] for i in starts])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _restore(self) -> None:
        state = torch.load(self.run_dir / "state.pt", weights_only=True, map_location=self.device)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.short.restore(state["short"])
        self.long.restore(state["long"])
        self.step, self.tokens, self.earlier_s = state["step"], state["tokens"], state["spent_s"]
        if state.get("decay"):
            self.schedule.forced = True
            self.schedule.decay_start_s, self.schedule.end_s = state["decay"]

    def save(self) -> None:
        """Writes state.pt, atomically."""
        state = {
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "short": self.short.state(), "long": self.long.state(), "tokens": self.tokens, "spent_s": self.spent_s(),
            "decay": (self.schedule.decay_start_s, self.schedule.end_s) if self.schedule.forced else None,
        }  # fmt: skip
        torch.save(state, self.run_dir / "state.tmp")
        (self.run_dir / "state.tmp").replace(self.run_dir / "state.pt")

    def spent_s(self) -> float:
        """CPU seconds (all threads) over all parts of this run; on a GPU, the CPU side of it."""
        return self.earlier_s + time.process_time()

    def evaluate(self) -> float:
        """Mean nats per token on the probe windows."""
        losses = []
        with torch.no_grad():
            for rows in torch.split(torch.arange(len(self.probe[0])), self.recipe.batch_rows):
                losses.append(float(self.loss(self.network, *(part[rows].to(self.device) for part in self.probe))))
        return sum(losses) / len(losses)

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; returns (nats per token, balance loss)."""
        recipe, spent_s = self.recipe, self.spent_s()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(self.step, spent_s)
        decay = self.schedule.decay_progress(spent_s)
        go_long = decay > 0.5 and (self.step * recipe.long_share) % 1 < recipe.long_share
        batch = self.long.batch(recipe.long_rows) if go_long else self.short.batch(recipe.batch_rows)
        inputs, targets = (part.to(self.device) for part in batch)
        loss = self.loss(self.network, inputs, targets)
        balance = balance_loss(self.network.routers())
        torch.autograd.backward(loss + recipe.balance_weight * balance)
        if decay > 0 and self.step % recipe.repetition_every_steps == 0:
            penalty = repetition_loss(self.network, self.short.batch(recipe.batch_rows)[0].to(self.device))
            torch.autograd.backward(recipe.repetition_weight * penalty)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip_norm)
        if math.isfinite(float(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.tokens = self.step + 1, self.tokens + inputs.numel()
        return loss.item(), balance.item()

    def train(self) -> None:
        """Steps until the budget is spent; logs a line at every evaluation."""
        recent: list[tuple[float, float]] = []
        started_s = time.monotonic()
        while True:
            self.schedule.poll(self.spent_s())
            over = self.schedule.decay_progress(self.spent_s()) >= 1
            if recent and (over or self.step % self.recipe.eval_every_steps == 0):
                losses, balances = zip(*recent, strict=True)
                line = {
                    "step": self.step, "tokens": self.tokens, "cpu_s": round(self.spent_s(), 1),
                    "wall_s": round(time.monotonic() - started_s, 1), "epoch": self.short.epoch,
                    "lr": self.optimizer.param_groups[0]["lr"], "train_nats": round(sum(losses) / len(losses), 4),
                    "balance": round(sum(balances) / len(balances), 4), "held_out_nats": round(self.evaluate(), 4),
                }  # fmt: skip
                with (self.run_dir / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
                recent = []
            if over or self.step % self.recipe.save_every_steps == 0:
                self.save()
            if over:
                return
            recent.append(self.train_step())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="state, tokenizer and log of this run")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/switchyard-demo", help="where packages go")
    parser.add_argument("--cpu-minutes", type=float, default=95.0, help="budget in CPU time of this process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Run(args.run_dir, args.cache, args.cpu_minutes * 60, args.device, Recipe()).train()


if __name__ == "__main__":
    main()
