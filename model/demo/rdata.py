"""A strict reader of R's lazy-load databases (NAME.rdx + NAME.rdb), for character vectors only.

Formats: R Internals, "1.8 Serialization Formats" (XDR, versions 2 and 3), and lazyload.R of R's base package: the .rdx
is a compressed serialisation of list(variables = list(name = c(offset, length)), references, compressed); each .rdb
chunk is a 4-byte big-endian unpacked size and a zlib stream. Anything else is refused with RDataError.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

MAX_CHUNK_BYTES = 64 * 2**20
# SEXP type codes, R Internals table "SEXPTYPEs" and serialize.c for those above 240.
SYM, LIST, CHAR, LGL, INT, REAL, STR, VEC, REF, NIL = 1, 2, 9, 10, 13, 14, 16, 19, 255, 254


class RDataError(ValueError):
    """The bytes are not the subset of R's serialisation that this reader takes."""


class _Reader:
    """Recursive descent over one XDR stream. Values: str, None, list, or dict for a named list."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.references: list[Any] = []
        if self.take(2) != b"X\n":
            raise RDataError("not an XDR serialisation")
        version, _, _ = (self.integer() for _ in range(3))
        if version == 3:
            self.take(self.integer())  # the native encoding's name
        elif version != 2:
            raise RDataError(f"serialisation version {version}")

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.data):
            raise RDataError("truncated")
        self.at += size
        return self.data[self.at - size : self.at]

    def integer(self) -> int:
        return int(struct.unpack(">i", self.take(4))[0])

    def vector(self, code: str, size: int) -> list[Any]:
        length = self.integer()
        return list(struct.unpack(f">{length}{code}", self.take(length * size)))

    def string(self) -> str | None:
        length = self.integer()
        return None if length == -1 else self.take(length).decode("utf-8", errors="replace")

    def pairlist(self, flags: int) -> dict[str, Any]:
        """Attributes and pairlists, as name -> value."""
        found: dict[str, Any] = {}
        while flags & 0xFF == LIST:
            if flags & 0x200:
                self.item()
            tag = self.item() if flags & 0x400 else ""
            found[str(tag)] = self.item()
            flags = self.integer()
        if flags & 0xFF != NIL:
            raise RDataError("pairlist without an end")
        return found

    def item(self) -> Any:
        flags = self.integer()
        kind = flags & 0xFF
        if kind == NIL:
            return None
        if kind == LIST:
            return self.pairlist(flags)
        if kind == SYM:
            self.references.append(self.item())
            return self.references[-1]
        if kind == REF:
            return self.references[(flags >> 8 or self.integer()) - 1]
        if kind == CHAR:
            return self.string()
        value: list[Any]
        if kind in (INT, LGL):
            value = self.vector("i", 4)
        elif kind == REAL:
            value = self.vector("d", 8)
        elif kind in (STR, VEC):
            value = [self.item() for _ in range(self.integer())]
        else:
            raise RDataError(f"SEXP type {kind} is not supported")
        names = self.pairlist(self.integer()).get("names") if flags & 0x200 else None
        return dict(zip(names, value, strict=True)) if names and kind == VEC else value


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    plain = inflater.decompress(data, MAX_CHUNK_BYTES)
    if inflater.unconsumed_tail or not inflater.eof:
        raise RDataError("chunk too large or truncated")
    return plain


def load_lazy_data(stem: Path) -> dict[str, list[str]]:
    """Every character vector of the database `stem`.rdx/.rdb, by its R name. Raises RDataError, OSError, zlib.error."""
    index = stem.with_suffix(".rdx").read_bytes()
    table = _Reader(gzip.decompress(index) if index[:2] == b"\x1f\x8b" else _inflate(index)).item()
    chunks = stem.with_suffix(".rdb").read_bytes()
    found: dict[str, list[str]] = {}
    for name, (offset, length) in table["variables"].items():
        value = _Reader(_inflate(chunks[offset + 4 : offset + length])).item()
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            found[name] = value
    return found
