"""Which licence terms a checkpoint comes with, decided from its folder alone. Plain Python: no vLLM, no torch.

What decides, first found:
1. a licence file in the folder (LICENSE, LICENCE, COPYING, LICENSE-MODEL, also as .txt or .md): its text;
2. what the weights are: Grok-1's or Grok-2's released dimensions, or Grok-1's ckpt-0 files, mean xAI's release;
3. `license:` in the front matter of the folder's README.md, as on the Hugging Face hub.
Anything else states no terms, and nothing is asked. So a model of Grok-2's architecture but other dimensions (tests,
models trained by others) is nobody's release, and the release keeps its terms when its licence file went missing or
somebody's card says otherwise.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from model.grok_spec import GrokSpec, is_grok, parse_spec

POWERED_BY_XAI = "Powered by xAI"

_LICENCE_FILE = re.compile(r"(licen[sc]e|copying)([-_ ](model|weights|grok.*))?(\.(txt|md))?", re.IGNORECASE)
_MOST_BYTES = 1 << 20
_GROK2_LICENCE = re.compile(r"\b(xai|grok[ -]?2(\.5)?) community licen[sc]e", re.IGNORECASE)
_APACHE2 = re.compile(r"apache license,? version 2\.0", re.IGNORECASE)
_MIT = re.compile(r"permission is hereby granted, free of charge, to any person obtaining a copy", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_CKPT0_FILES = 770


@dataclass(frozen=True)
class Terms:
    """A licence. `attribution` is what must be shown with outputs, None where nothing must."""

    name: str
    conditions: tuple[str, ...] = ()
    must_accept: bool = False
    attribution: str | None = None


APACHE2 = Terms("Apache-2.0", ("Any use; keep the licence and the notices with copies of the weights.",))
MIT = Terms("MIT", ("Any use; keep the licence and the copyright notice with copies of the weights.",))
GROK2 = Terms(
    "Grok 2 Community License",
    (
        "Commercial use only by companies with less than US$1 million of yearly revenue.",
        "Neither the weights nor their outputs may train other foundation models.",
        f'Outputs are labelled "{POWERED_BY_XAI}".',
        "These are the terms as reported; the licence file that comes with the weights decides.",
    ),
    must_accept=True,
    attribution=POWERED_BY_XAI,
)
UNKNOWN_TEXT = Terms("as in its licence file", ("Read the licence file.",))
UNSTATED = Terms("not stated", ("The folder names no licence. Ask whoever published the weights.",))


@dataclass(frozen=True)
class Licence:
    """The terms of one checkpoint, `basis` in words why these, and the licence file's text where there is one."""

    terms: Terms
    basis: str
    file: Path | None = None
    text: str = ""


def licence_of(folder: Path) -> Licence:
    """The licence of the checkpoint in `folder`. A missing or unreadable config.json decides nothing.

    Of several licence files the one that asks for acceptance counts. A text that is not recognised beside Grok-2's
    released weights asks for it too: xAI may have reworded its licence. Raises CheckpointError for a file that cannot
    be read.
    """
    release = _release(folder)
    found = [_licence_in(path, release) for path in licence_files(folder)]
    if found:
        return next((licence for licence in found if licence.terms.must_accept), found[0])
    if release is not None:
        return Licence(release.terms, f"{folder} has no licence file and {release.evidence}")
    named = _card_licence(folder / "README.md")
    if named:
        return Licence(terms_of_name(named), f"README.md in {folder} names {named}")
    return Licence(UNSTATED, f"{folder} has no licence file, and its README.md names none")


def terms_of_text(text: str) -> Terms:
    """The terms that a licence text states; a text nobody here knows is its own terms."""
    plain = re.sub(r"[\s#*_>]+", " ", text)
    if _GROK2_LICENCE.search(plain):
        return GROK2
    if _APACHE2.search(plain):
        return APACHE2
    return MIT if _MIT.search(plain) else UNKNOWN_TEXT


def terms_of_name(name: str) -> Terms:
    """The terms behind an identifier such as `apache-2.0` or `grok-2`, as model cards use them."""
    words = re.sub(r"[\s_]+", "-", name.strip().lower())
    if words.startswith(("grok-2", "xai-community", "xai-grok-2")):
        return GROK2
    known = {"apache-2.0": APACHE2, "mit": MIT}
    return known.get(words) or Terms(name, ("See the terms under this name.",))


def is_released_grok2(spec: GrokSpec) -> bool:
    """Whether the dimensions are those of xai-org/grok-2; the vocabulary may have been extended."""
    sizes = (spec.num_layers, spec.hidden_size, spec.num_experts, spec.expert_size, spec.mlp_size, spec.num_heads)
    return spec.is_grok2 and sizes == (64, 8192, 8, 16384, 32768, 64)


def is_released_grok1(spec: GrokSpec) -> bool:
    """Whether the dimensions are those of xai-org/grok-1; the vocabulary may have been extended."""
    sizes = (spec.num_layers, spec.hidden_size, spec.num_experts, spec.expert_size, spec.num_heads)
    return not spec.is_grok2 and sizes == (64, 6144, 8, 32768, 48)


@dataclass(frozen=True)
class _Release:
    terms: Terms
    evidence: str


def _release(folder: Path) -> _Release | None:
    """Which of xAI's releases the weights are, told without reading them; None for everything else."""
    spec = _grok_spec(folder / "config.json")
    if spec is not None and is_released_grok2(spec):
        return _Release(GROK2, "the dimensions of xAI's Grok-2")
    if spec is not None and is_released_grok1(spec):
        return _Release(APACHE2, "the dimensions of xAI's Grok-1")
    if len(list(folder.glob("tensor?????_000"))) == _CKPT0_FILES:
        return _Release(APACHE2, f"the {_CKPT0_FILES} files of xAI's Grok-1")
    return None


def _licence_in(path: Path, release: _Release | None) -> Licence:
    text = _start_of(path)
    terms = terms_of_text(text)
    if terms is UNKNOWN_TEXT and release is not None and release.terms.must_accept:
        terms = replace(terms, must_accept=True, attribution=release.terms.attribution)
    return Licence(terms, f"the file {path.name} in {path.parent}", path, text)


def licence_files(folder: Path) -> list[Path]:
    """The licence files in a folder, the one that decides first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _LICENCE_FILE.fullmatch(path.name) and path.is_file()]
    return sorted(found, key=lambda path: (re.search(r"[-_ ]", path.name) is None, path.name))  # LICENSE-MODEL first


def _start_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}, which decides the licence: {error.strerror}.") from None


def _card_licence(card: Path) -> str | None:
    """`license` of a model card's front matter; where it says "other", `license_name`."""
    if not card.is_file():
        return None
    matter = _FRONT_MATTER.match(_start_of(card))
    if matter is None:
        return None
    fields = dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([^\"'\n#]+)", matter[1], re.MULTILINE))
    name = fields.get("license", "").strip()
    return (fields.get("license_name", "").strip() or name) if name in ("", "other") else name


def _grok_spec(path: Path) -> GrokSpec | None:
    try:
        config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return parse_spec(config) if isinstance(config, dict) and is_grok(config) else None
    except (OSError, ValueError, TypeError):
        return None
