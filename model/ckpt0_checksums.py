"""SHA-256 of ckpt-0's files where the download left them: the only way to tell two files of one shape apart.

Looked for, for each file: a line in SHA256SUMS (as sha256sum writes it) in the folder or the one above; the blob name
that a file of the Hugging Face cache is a link to; the metadata that `hf download --local-dir` keeps.
"""

import re
from pathlib import Path

from cluster.errors import CheckpointError

SUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:.*/)?([^/]+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def known_checksums(paths: list[Path]) -> dict[str, str]:
    """File name -> hexadecimal SHA-256, for those of `paths` (files of one folder) that the download vouches for."""
    listed = _listed(paths[0].parent.parent) | _listed(paths[0].parent)
    found = {path.name: listed.get(path.name) or _of_cache(path) or _of_local_dir(path) for path in paths}
    return {name: checksum for name, checksum in found.items() if checksum}


def _listed(folder: Path) -> dict[str, str]:
    path = folder / SUMS_FILE
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    matches = [(line, _LINE.fullmatch(line)) for line in lines if line.strip()]
    broken = next((line for line, match in matches if match is None), None)
    if broken is not None:
        raise CheckpointError(
            f"{path} has a line that is not `SHA-256  file name`: {broken[:80]!r}. Correct or remove it."
        )
    return {match[2]: match[1].lower() for _, match in matches if match is not None}


def _of_cache(path: Path) -> str | None:
    """snapshots/<revision>/ckpt-0/<file> is a link to blobs/<sha256>."""
    name = path.resolve().name
    return name if path.is_symlink() and _SHA256.fullmatch(name) else None


def _of_local_dir(path: Path) -> str | None:
    """<dir>/.cache/huggingface/download/<path in the repository>.metadata: commit, etag (SHA-256 for LFS), time."""
    for root, inner in ((path.parent.parent, Path(path.parent.name)), (path.parent, Path())):
        metadata = root / ".cache/huggingface/download" / inner / f"{path.name}.metadata"
        if metadata.is_file():
            words = metadata.read_text(encoding="utf-8", errors="replace").split()
            return next((word for word in words[1:2] if _SHA256.fullmatch(word)), None)
    return None
