"""The models Switchyard knows by name: their published configs (known_models.json), and what follows from them.

Nothing here is a size: sizes are counted from the configs by model/sizes.py. The configs hold the fields that decide
sizes, copied from the source that each entry names.
"""

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ConfigError
from model.licence import Terms, licence_of, terms_of_name
from model.sizes import PRECISIONS, ModelSizes, sizes_of

GB = 10**9
WORKER_MEMORY_GB = (24, 80, 141)

_DATA = Path(__file__).with_name("known_models.json")


@dataclass(frozen=True)
class Model:
    """One model. sizes is None for a model that is not released; source: where its config is published, or its path."""

    name: str
    title: str
    source: str
    note: str
    terms: Terms | None
    sizes: ModelSizes | None


@functools.cache
def known_models() -> tuple[Model, ...]:
    """Every model of the catalog, in its order."""
    return tuple(_known(entry) for entry in json.loads(_DATA.read_text(encoding="utf-8")))


def find_known(name: str) -> Model | None:
    """The model of that name, however it is capitalised."""
    return next((model for model in known_models() if model.name == name.lower()), None)


def known_config(name: str) -> dict[str, Any]:
    """The published config of a model of the catalog: the fields that decide its sizes."""
    entries = json.loads(_DATA.read_text(encoding="utf-8"))
    config: dict[str, Any] = next(entry["config"] for entry in entries if entry["name"] == name)
    return config


def model_at(folder: Path, name: str) -> Model:
    """The checkpoint in `folder` under the name that was asked for, by its config.json alone.

    Raises CheckpointError, naming the file.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: give the path of a checkpoint folder.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    try:
        sizes = sizes_of(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    licence = licence_of(folder)
    return Model(name, name, str(path), "", licence.terms, sizes)


def unknown_model(name: str) -> ConfigError:
    """What to say about a name that is neither known nor a folder."""
    names = [model.name for model in known_models()]
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0]
    return ConfigError(f"{name} is neither a known model nor a folder. The nearest name is {near}.")


def report(model: Model) -> dict[str, Any]:
    """Everything about a model as JSON: counts, bytes, and workers by precision and by their memory in GB."""
    facts: dict[str, Any] = {"name": model.name, "title": model.title, "source": model.source, "note": model.note}
    facts["licence"] = model.terms.name if model.terms is not None else None
    if (sizes := model.sizes) is None:
        return facts
    return facts | {
        "layers": sizes.num_layers,
        "moe_layers": sizes.num_moe_layers,
        "experts": sizes.num_experts,
        "top_k": sizes.top_k,
        "hidden_size": sizes.hidden_size,
        "vocab_size": sizes.vocab_size,
        "total_params": sizes.total_params,
        "active_params": sizes.active_params,
        "embedding_params": sizes.embedding_params,
        "expert_params": sizes.expert_params,
        "dense_bytes": sizes.dense_bytes,
        "kv_bytes_per_token": sizes.kv_bytes_per_token,
        "expert_bytes": {precision: _expert_report(sizes, precision) for precision in PRECISIONS},
    }


def _expert_report(sizes: ModelSizes, precision: str) -> dict[str, Any]:
    return {
        "expert": sizes.expert_bytes(precision),
        "layer": sizes.layer_expert_bytes(precision),
        "total": sizes.all_expert_bytes(precision),
        "workers": {str(gb): sizes.num_workers(gb * GB, precision) for gb in WORKER_MEMORY_GB},
    }


def _known(entry: Mapping[str, Any]) -> Model:
    config, licence = entry["config"], entry["licence"]
    return Model(
        name=entry["name"],
        title=entry["title"],
        source=entry["source"] or "",
        note=entry.get("note", ""),
        terms=terms_of_name(licence) if licence else None,
        sizes=sizes_of(config) if config else None,
    )
