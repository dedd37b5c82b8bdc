"""What is known about a model before anything starts: where it lies, its licence, its tokenizer. No Ray, no vLLM."""

from pathlib import Path

from cluster.config import Settings
from cluster.errors import ConfigError, LicenceNotAccepted
from model.licence import Terms, licence_of
from model.tokenizer_files import find_tokenizer

DEMO_MODEL = "demo"


def resolve_model(model: str) -> Path:
    """The checkpoint's absolute path. "demo" is the model that comes with Switchyard; write ./demo for a folder."""
    if model == DEMO_MODEL:
        import model as model_package

        return Path(model_package.__path__[0]).resolve() / "demo" / "checkpoint"
    return Path(model).expanduser().resolve()


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


def has_tokenizer(model: str) -> bool:
    """Whether the checkpoint in folder `model` can be given text; else prompts are token ids."""
    return find_tokenizer(Path(model)) is not None


def describe_licence(model: str) -> str:
    """The terms of a checkpoint folder, for people; the folder's licence file in full. Raises ConfigError."""
    folder = resolve_model(model)
    if not folder.is_dir():
        raise ConfigError(f"{model} is not a folder: give the path of a checkpoint.")
    licence = licence_of(folder)
    lines = [
        f"{model}: {licence.terms.name}",
        f"  decided by: {licence.basis}",
        *terms_lines(licence.terms),
    ]
    if licence.file is not None:
        lines += ["", f"---- {licence.file} ----", licence.text.rstrip()]
    return "\n".join(lines)


def terms_lines(terms: Terms) -> list[str]:
    """The conditions of a licence, one a line, and what serving under it takes."""
    lines = [f"  - {condition}" for condition in terms.conditions]
    if terms.must_accept:
        lines.append("  serving asks for `license: accepted` in the configuration, or --accept-license")
    if terms.attribution:
        lines.append(f"  shown with every response and in /v1/models: {terms.attribution}")
    return lines
