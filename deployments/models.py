"""What is known about a model before anything starts: where it lies, its licence, its tokenizer. No Ray, no vLLM."""

import json
from pathlib import Path
from typing import Any

from cluster.config import Settings
from cluster.errors import ConfigError, LicenceNotAccepted
from cluster.roofline import ModelFacts
from model.catalog import WORKER_MEMORY_GB, Model, find_known, known_models, model_at, report, unknown_model
from model.licence import Terms, licence_of
from model.sizes import PRECISIONS
from model.tokenizer_files import find_tokenizer

__all__ = [
    "DEMO_MODEL",
    "WORKER_MEMORY_GB",
    "attribution_of",
    "check_licence",
    "describe_licence",
    "find_model",
    "has_tokenizer",
    "known_models",
    "licence_summary",
    "longest_context",
    "plan_facts",
    "report",
    "resolve_model",
]

DEMO_MODEL = "demo"


def resolve_model(model: str) -> Path:
    """The checkpoint's absolute path. "demo" is the model that comes with Switchyard; write ./demo for a folder."""
    if model == DEMO_MODEL:
        import model as model_package

        return Path(model_package.__path__[0]).resolve() / "demo" / "checkpoint"
    return Path(model).expanduser().resolve()


def find_model(model: str) -> Model:
    """A model of the catalog by its name, else the checkpoint in that folder. Raises ConfigError for neither."""
    known = find_known(model)
    if known is not None:
        return known
    folder = resolve_model(model)
    if not folder.is_dir():
        raise unknown_model(model)
    return model_at(folder, model)


def plan_facts(model: Model) -> dict[str, ModelFacts]:
    """What a plan needs to know of the model, by the precision of its experts. Raises ConfigError without sizes."""
    sizes = model.sizes
    if sizes is None:
        raise ConfigError(f"{model.name}: {model.note}, so its size is not known.")
    return {
        precision: ModelFacts(
            name=model.name,
            precision=precision,
            num_moe_layers=sizes.num_moe_layers,
            num_experts=sizes.num_experts,
            top_k=sizes.top_k,
            hidden_size=sizes.hidden_size,
            num_heads=sizes.num_heads,
            kv_parts=sizes.kv_parts,
            expert_bytes=sizes.expert_bytes(precision),
            expert_params=sizes.expert_params,
            dense_bytes=sizes.dense_bytes,
            dense_params=sizes.dense_params,
            kv_bytes_per_token=sizes.kv_bytes_per_token,
        )
        for precision in PRECISIONS
    }


def longest_context(model: str) -> int | None:
    """max_position_embeddings of a checkpoint folder's config.json, in tokens; None where it is not said."""
    path = resolve_model(model) / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    length = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def check_licence(settings: Settings) -> None:
    """Raises LicenceNotAccepted when the terms of settings.model must be accepted and `license` does not say so."""
    licence = licence_of(Path(settings.model))
    if not licence.terms.must_accept or settings.license == "accepted":
        return
    raise LicenceNotAccepted(
        f"{settings.model} is under the {licence.terms.name} ({licence.basis}), which has to be accepted first: "
        f"{' '.join(licence.terms.conditions)} Read it with `switchyard license {settings.model}`. To accept it, set "
        "`license: accepted` in the configuration, or give --accept-license to `switchyard serve`."
    )


def attribution_of(model: str) -> str | None:
    """What must be shown with the outputs of the checkpoint in folder `model`; None where nothing must."""
    return licence_of(Path(model)).terms.attribution


def licence_summary(model: str) -> dict[str, Any]:
    """{"name", "basis", "conditions", "attribution"} of the checkpoint in folder `model`, in plain JSON types."""
    licence = licence_of(Path(model))
    terms = licence.terms
    return {
        "name": terms.name,
        "basis": licence.basis,
        "conditions": list(terms.conditions),
        "attribution": terms.attribution,
    }


def has_tokenizer(model: str) -> bool:
    """Whether the checkpoint in folder `model` can be given text; else prompts are token ids."""
    return find_tokenizer(Path(model)) is not None


def describe_licence(model: str) -> str:
    """The terms of a known model or a checkpoint folder, for people; the folder's licence file in full.

    Raises ConfigError for a name that is neither.
    """
    known = find_known(model)
    if known is not None:
        decided_by = "what its publisher states; the licence file that comes with the weights decides"
        return _terms_page(model, known.terms, decided_by) if known.terms else f"{known.title}: {known.note}"
    folder = resolve_model(model)
    if not folder.is_dir():
        raise unknown_model(model)
    licence = licence_of(folder)
    page = _terms_page(model, licence.terms, licence.basis)
    return page if licence.file is None else f"{page}\n\n---- {licence.file} ----\n{licence.text.rstrip()}"


def _terms_page(model: str, terms: Terms, decided_by: str) -> str:
    lines = [f"{model}: {terms.name}", f"  decided by: {decided_by}"]
    lines += [f"  - {condition}" for condition in terms.conditions]
    if terms.must_accept:
        lines.append("  serving asks for `license: accepted` in the configuration, or --accept-license")
    if terms.attribution:
        lines.append(f"  shown with every response and in /v1/models: {terms.attribution}")
    return "\n".join(lines)
