"""Exports a finished training run as a Hugging Face checkpoint and writes its model card from measurements.

    python -m model.demo.card --run-dir /tmp/run --out model/demo/checkpoint

Writes config.json, model.safetensors (bfloat16), the tokenizer's files, training_log.csv, loss.svg and README.md. Every
figure in the card comes from the run's log or is measured here, on the exported weights.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from model.demo.corpus import PACKAGES, PROVENANCE, Chapter, load_corpus
from model.demo.measure import Figures, loop_share, measure, samples
from model.demo.network import Grok2, load_checkpoint
from model.demo.text import encode_chapters, save_tokenizer
from model.demo.train import CONFIG, Recipe

TEMPLATE = Path(__file__).with_name("card_template.md")
BASELINE = "modified Kneser-Ney 5-gram"


def export(run_dir: Path, out: Path) -> dict[str, Any]:
    """Writes bfloat16 weights, config and tokenizer; returns the run's totals (step, tokens, spent_s, decay)."""
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(run_dir / "state.pt", weights_only=True, map_location="cpu")
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state["network"].items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    (out / "config.json").write_text(json.dumps(CONFIG.to_json(), indent=2) + "\n")
    save_tokenizer(Tokenizer.from_file(str(run_dir / "tokenizer.json")), out, CONFIG.max_position_embeddings)
    return {key: state[key] for key in ("step", "tokens", "spent_s", "decay")}


def read_log(run_dir: Path, out: Path) -> list[dict[str, Any]]:
    """The run's evaluation lines, copied to training_log.csv. Of steps repeated after a resume the last one counts."""
    lines = {line["step"]: line for line in map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())}
    rows = [lines[step] for step in sorted(lines)]
    with (out / "training_log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def loss_svg(rows: list[dict[str, Any]], baseline_nats: float) -> str:
    """Training and held-out loss (nats per token) over tokens trained, with the baseline as a dashed line."""
    width, height, left, bottom = 640, 320, 56, 40
    most_tokens = max(row["tokens"] for row in rows)
    values = [row[key] for row in rows for key in ("train_nats", "held_out_nats")] + [baseline_nats]
    low, high = min(values) - 0.1, min(6.5, max(values) + 0.1)

    def x(tokens: float) -> float:
        return left + tokens / most_tokens * (width - left - 16)

    def y(nats: float) -> float:
        return 16 + (high - min(nats, high)) / (high - low) * (height - bottom - 16)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"',
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i in range(5):
        nats, tokens = low + (high - low) * i / 4, most_tokens * i / 4
        parts.append(f'<path d="M{left} {y(nats):.1f}H{width - 16}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(nats) + 4:.1f}" text-anchor="end">{nats:.1f}</text>')
        parts.append(f'<text x="{x(tokens):.1f}" y="{height - 22}" text-anchor="middle">{tokens / 1e6:.1f}M</text>')
    for key, colour in (("train_nats", "#999"), ("held_out_nats", "#0a58ca")):
        points = " ".join(f"{x(row['tokens']):.1f},{y(row[key]):.1f}" for row in rows)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    parts.append(f'<path d="M{left} {y(baseline_nats):.1f}H{width - 16}" stroke="#c00" stroke-dasharray="6 4"/>')
    legend = (("held-out sample", "#0a58ca"), ("training", "#999"), (f"{BASELINE}, all held-out text", "#c00"))
    for i, (label, colour) in enumerate(legend):
        parts.append(f'<text x="{width - 20}" y="{34 + 16 * i}" text-anchor="end" fill="{colour}">{label}</text>')
    parts.append(f'<text x="{left}" y="{height - 6}">tokens trained; vertical: nats per token</text></svg>')
    return "\n".join(parts) + "\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results_section(figures: Figures) -> str:
    """Perplexity against the baselines, overall and by source."""
    overall = [
        [name, f"{s.perplexity:.1f}", f"{s.nats_per_token:.3f}", f"{s.bits_per_byte:.3f}"]
        for name, s in figures.scores.items()
    ]
    own = next(iter(figures.scores))
    sources = [
        [name, f"{by[own].perplexity:.1f}", f"{by[BASELINE].perplexity:.1f}", f"{by[own].bits_per_byte:.3f}"]
        for name, by in figures.by_source.items()
    ]
    return f"""## Held-out perplexity

Whole chapters that neither the tokenizer, the model nor the baselines saw ({figures.num_tokens:,} tokens,
{figures.num_bytes:,} bytes); every model predicts the same tokens of the same tokenizer. The demo model reads
windows of its full context that do not overlap, so it starts each without any; the n-gram models never do.

{table(["model", "perplexity", "nats/token", "bits/byte"], overall)}

By source:

{table(["source", "demo model", "5-gram", "demo bits/byte"], sources)}
"""


def curve_section(rows: list[dict[str, Any]]) -> str:
    """About ten rows of the log; the rest is in the CSV."""
    recipe, step = Recipe(), max(1, len(rows) // 10)
    shown = rows[::step] + ([] if (len(rows) - 1) % step == 0 else [rows[-1]])
    lines = [
        [f"{r['step']}", f"{r['tokens'] / 1e6:.2f}M", f"{r['cpu_s'] / 60:.1f}", f"{r['lr']:.1e}",
         f"{r['train_nats']:.3f}", f"{r['held_out_nats']:.3f}", f"{r['balance']:.3f}"] for r in shown
    ]  # fmt: skip
    head = ["step", "tokens", "CPU min", "learning rate", "training nats", "held-out nats (sample)", "balance loss"]
    return f"""## Loss curve

![loss curve](loss.svg)

{table(head, lines)}

All points: `training_log.csv`. Training nats are the mean since the point before, chats included; the sample is
{recipe.eval_windows} fixed held-out windows of {recipe.window_tokens} tokens. A balance loss of 1 is a perfectly even
expert load.
"""


def load_section(figures: Figures) -> str:
    """Share of all top-2 choices per expert and layer."""
    experts = [f"e{e}" for e in range(figures.expert_load.shape[1])]
    rows = [[str(layer), *(f"{share:.1%}" for share in loads)] for layer, loads in enumerate(figures.expert_load)]
    return f"## Expert load on the held-out text\n\n{table(['layer', *experts], rows)}\n"


def decay_sentence(decay: tuple[float, float] | None) -> str:
    """When the learning rate fell; `decay` is its span in CPU seconds when it was started by hand, else None."""
    if decay is None:
        return f"The learning rate fell to zero over the last {Recipe().decay_share:.0%} of the budget."
    start, end = (seconds / 60 for seconds in decay)
    return f"The run was ended early: its learning rate fell to zero from CPU-minute {start:.1f} to {end:.1f}."


def corpus_section(train: list[Chapter], held_out: list[Chapter]) -> str:
    """What it was trained on, with provenance and sizes."""
    lines = []
    for source, text in PROVENANCE.items():
        sizes = [sum(len(c.text) for c in part if c.source == source) for part in (train, held_out)]
        lines.append(f"- `{source}`: {text} {sizes[0]:,} characters trained on, {sizes[1]:,} held out.")
    return "## Text\n\n" + "\n".join(lines) + f"\n\nDebian packages: {', '.join(PACKAGES)}; `train.py` fetches them.\n"


def write_card(out: Path, totals: dict[str, Any], rows: list[dict[str, Any]], network: Grok2, cache: Path) -> None:
    """Measures the exported checkpoint and writes README.md and loss.svg."""
    train, held_out = load_corpus(cache)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    figures = measure(network, tokenizer, train, held_out)
    held_ids = encode_chapters(tokenizer, held_out)
    looping = {name: loop_share(network, held_ids, temp) for name, temp in (("greedy", 0.0), ("temperature 0.8", 0.8))}
    (out / "loss.svg").write_text(loss_svg(rows, figures.scores[BASELINE].nats_per_token))
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    num_train = sum(map(len, encode_chapters(tokenizer, train)))
    quoted = [
        f"**{prompt}** ({kind})\n\n> {text.strip().replace(chr(10), chr(10) + '> ')}\n"
        for prompt, kind, text in samples(network, tokenizer)
    ]
    fields = {
        **{f"config_{key}": value for key, value in asdict(network.config).items()},
        **{f"recipe_{key}": value for key, value in asdict(Recipe()).items()},
        "millions": f"{num_parameters / 1e6:.1f}",
        "trained_millions": f"{totals['tokens'] / 1e6:.2f}",
        "corpus_millions": f"{num_train / 1e6:.2f}",
        "passes": f"{totals['tokens'] / num_train:.1f}",
        "steps": totals["step"],
        "cpu_minutes": f"{totals['spent_s'] / 60:.0f}",
        "decay": decay_sentence(totals["decay"]),
        "core_minutes": f"{totals['spent_s'] / 120:.0f}",
        "results": results_section(figures),
        "curve": curve_section(rows),
        "load": load_section(figures),
        "corpus": corpus_section(train, held_out),
        "repeats": ", ".join(f"{share:.0%} {name}" for name, share in looping.items()),
        "samples": "\n".join(quoted),
    }
    (out / "README.md").write_text(TEMPLATE.read_text().format_map(fields))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="a directory that model.demo.train wrote")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint directory to write")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/switchyard-demo", help="where packages go")
    args = parser.parse_args()
    totals = export(args.run_dir, args.out)
    rows = read_log(args.run_dir, args.out)
    write_card(args.out, totals, rows, load_checkpoint(args.out), args.cache)


if __name__ == "__main__":
    main()
