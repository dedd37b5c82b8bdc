"""Which tokenizer a checkpoint folder has, and what vLLM is told about it. Cheap to import: no vLLM, no torch."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from model.grok_spec import is_grok

logger = logging.getLogger(__name__)

# vLLM loads these by itself; the first two also for a Grok, of whose own files Transformers knows nothing.
LOADABLE = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
GROK_LOADABLE = LOADABLE[:2]
# xAI's own files, converted when an engine starts.
GROK_CONVERTIBLE = ("tokenizer.tok.json", "tokenizer.model")

_CONVERTER_VERSION = 1


def find_tokenizer(folder: Path) -> Path | None:
    """The file that the checkpoint's tokenizer is read from; None where prompts can only be token ids."""
    names = (*GROK_LOADABLE, *GROK_CONVERTIBLE) if _is_grok_folder(folder) else LOADABLE
    return _first_file(folder, names)


def tokenizer_args(model: str | Path) -> dict[str, Any]:
    """vLLM's engine arguments for the tokenizer of a checkpoint folder.

    {} where vLLM finds it by itself. A Grok with xAI's own file gets the folder of its conversion, which also holds
    Grok-2's stop tokens (unless the checkpoint has a generation_config.json). A folder without any tokenizer is served
    by token ids alone. Raises CheckpointError for a tokenizer file that cannot be converted.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {}
    source = find_tokenizer(folder)
    if source is None:
        logger.warning("%s has no tokenizer: prompts and answers are token ids", folder)
        return {"skip_tokenizer_init": True}
    if source.name not in GROK_CONVERTIBLE or not _is_grok_folder(folder):
        return {}
    converted = converted_tokenizer(source)
    arguments = {"tokenizer": str(converted)}
    if (converted / "generation_config.json").is_file() and not (folder / "generation_config.json").is_file():
        arguments["generation_config"] = str(converted)
    return arguments


def converted_tokenizer(source: Path) -> Path:
    """A folder with the Hugging Face form of xAI's tokenizer file, converted once for each content of the file.

    It has the checkpoint's config.json too, because vLLM looks for one beside a tokenizer. It lies in the user's cache
    (XDG_CACHE_HOME); several processes may ask at once. Raises CheckpointError as the converters do, ConfigError when
    the cache cannot be written.
    """
    from model import grok_tokenizer

    convert = grok_tokenizer.write_grok2 if source.name == grok_tokenizer.GROK2_FILE else grok_tokenizer.write_grok1
    config = source.with_name("config.json")
    contents = [f"{_CONVERTER_VERSION} {source.name}".encode(), source.read_bytes(), config.read_bytes()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "switchyard" / "tokenizers"
    target = cache / digest[:32]
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="converting-", dir=cache))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {cache}: {error.strerror}. Set XDG_CACHE_HOME to a folder that can."
        ) from None
    try:
        convert(source, work)
        _copy_config(config, work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _copy_config(config: Path, folder: Path) -> None:
    # Without a version of at least 5 Transformers suspects every large tokenizer of an old mistake of Mistral's.
    content = json.loads(config.read_text(encoding="utf-8")) | {"transformers_version": "5.0.0"}
    (folder / config.name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _is_grok_folder(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and is_grok(json.loads(config.read_text(encoding="utf-8")))
