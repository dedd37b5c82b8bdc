"""The demo model's text: public-domain books that three Debian packages ship.

`python -m model.demo.corpus --cache DIR` fetches and unpacks them and prints a table of what was found.

| package            | text                                     | form in the package                          |
|--------------------|------------------------------------------|----------------------------------------------|
| bible-kjv(-text)   | King James Bible (1611)                  | its own format; its `bible` program prints it |
| r-cran-janeaustenr | Jane Austen's six novels (1811-1818)     | R lazy-load data: lines of text               |
| r-cran-tokenizers  | Herman Melville, Moby-Dick (1851)        | R lazy-load data: one string per chapter      |

A document is one chapter; a chapter is held out (never trained on) when its number in its book's list, counted over the
whole source, leaves remainder `HELD_OUT_PHASE` modulo `HELD_OUT_EVERY`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

from model.demo.rdata import load_lazy_data

PACKAGES = ("bible-kjv", "bible-kjv-text", "r-cran-janeaustenr", "r-cran-tokenizers")
NOVELS = ("sensesensibility", "prideprejudice", "mansfieldpark", "emma", "northangerabbey", "persuasion")
SITE_LIBRARY = Path("usr/lib/R/site-library")
HELD_OUT_EVERY, HELD_OUT_PHASE = 24, 11
MIN_CHAPTER_CHARS = 400
PROVENANCE = {
    "bible": "King James Bible (1611), Debian package bible-kjv-text: text out of copyright (see its copyright file).",
    "austen": "Jane Austen, six novels (1811-1818), Debian package r-cran-janeaustenr (package MIT; the texts are "
    "Project Gutenberg's transcriptions of out-of-copyright books).",
    "melville": "Herman Melville, Moby-Dick (1851), Debian package r-cran-tokenizers (package MIT; the text is Project "
    "Gutenberg's transcription of an out-of-copyright book).",
}


class CorpusError(RuntimeError):
    """A package could not be fetched, or what it holds is not what this module expects."""


@dataclass(frozen=True)
class Chapter:
    """One document: `text` has paragraphs separated by a newline, without heading or verse numbers."""

    source: str
    text: str


def fetch(cache: Path) -> Path:
    """Downloads the packages with apt-get (no root needed) and unpacks them; returns the unpacked root."""
    root = cache / "root"
    if (root / ".complete").exists():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=cache, check=True, capture_output=True, timeout=300)
        for package in PACKAGES:
            deb = max(cache.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        message = f"fetching {', '.join(PACKAGES)} failed (a Debian with package lists is needed): {error}"
        raise CorpusError(message) from error
    (root / ".complete").touch()
    return root


def read_bible(root: Path) -> list[Chapter]:
    """King James Bible, verses of a chapter joined by spaces; printed by the package's own program."""
    library = root / "usr/lib"
    command = [str((root / "usr/bin/bible").resolve()), "-p", ".", "-f"]
    everything = "gen1:1-rev22:21\n"  # a range over every book; -f prints one verse per line
    done = subprocess.run(
        command, cwd=library, input=everything, capture_output=True, text=True, timeout=120, check=True
    )
    verses: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        match = re.match(r"(?:bible\(KJV\) \[[^\]]*\]> )?([1-3]?[A-Z][A-Za-z]+\d+):(\d+) (.*)$", line)
        if match:
            chapter, number, text = match.groups()
            known = verses.setdefault(chapter, [])
            if int(number) == len(known) + 1:  # the program echoes its start verse before the range
                known.append(" ".join(text.split()))
    if len(verses) != 1189:  # the number of chapters of the Protestant canon
        raise CorpusError(f"bible: expected 1189 chapters, found {len(verses)}")
    return [Chapter("bible", " ".join(lines)) for lines in verses.values()]


def unwrap(lines: list[str]) -> list[str]:
    """Paragraphs out of lines wrapped at ~70 columns, blank lines between paragraphs; italic underscores dropped."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines))
    return [text for text in (" ".join(block.replace("_", "").split()) for block in blocks) if text]


def split_chapters(source: str, paragraphs: list[str], heading: re.Pattern[str]) -> list[Chapter]:
    """Cuts at headings, which are dropped with everything before the first and every all-capitals paragraph."""
    chapters: list[list[str]] = []
    for paragraph in paragraphs:
        if heading.match(paragraph):
            chapters.append([])
        elif chapters and not paragraph.isupper():
            chapters[-1].append(paragraph)
    texts = ["\n".join(chapter) for chapter in chapters]
    return [Chapter(source, text) for text in texts if len(text) >= MIN_CHAPTER_CHARS]


def plain(text: str) -> str:
    """One spelling for quotes, so that few tokens are spent on typography."""
    plain_of = {0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'", 0xFEFF: ""}
    return text.translate(plain_of)


def read_austen(root: Path) -> list[Chapter]:
    """The six novels, one document per chapter."""
    data = load_lazy_data(root / SITE_LIBRARY / "janeaustenr/data/Rdata")
    heading = re.compile(r"(chapter|volume)\s+[\dIVXLC]+\.?$", re.IGNORECASE)
    found: list[Chapter] = []
    for novel in NOVELS:
        paragraphs = unwrap([plain(line) for line in data[novel]])
        chapters = split_chapters("austen", paragraphs, heading)
        if not 20 <= len(chapters) <= 65:
            raise CorpusError(f"austen: {novel} has {len(chapters)} chapters")
        found += chapters
    return found


def read_melville(root: Path) -> list[Chapter]:
    """Moby-Dick, one document per chapter."""
    data = load_lazy_data(root / SITE_LIBRARY / "tokenizers/data/Rdata")
    text = plain("\n".join(data["mobydick"]))
    paragraphs = unwrap(text.splitlines())
    chapters = split_chapters("melville", paragraphs, re.compile(r"(CHAPTER \d+\b|Epilogue$|EPILOGUE$)"))
    if not 100 <= len(chapters) <= 140:
        raise CorpusError(f"melville: {len(chapters)} chapters")
    return chapters


def load_corpus(cache: Path) -> tuple[list[Chapter], list[Chapter]]:
    """(training chapters, held-out chapters), each in book order. Deterministic.

    Raises CorpusError if a package is missing or looks different from the version this was written for."""
    root = fetch(cache)
    train: list[Chapter] = []
    held_out: list[Chapter] = []
    try:
        sources = [read_austen(root), read_bible(root), read_melville(root)]
    except (OSError, subprocess.SubprocessError, zlib.error, KeyError) as error:
        raise CorpusError(f"unreadable package contents under {root}: {error!r}") from error
    for chapters in sources:
        for i, chapter in enumerate(chapters):
            (held_out if i % HELD_OUT_EVERY == HELD_OUT_PHASE else train).append(chapter)
    return train, held_out


def main() -> None:
    """Fetches, and prints one line per source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/switchyard-demo", help="where packages go")
    parts = dict(zip(("train", "held-out"), load_corpus(parser.parse_args().cache), strict=True))
    for name, chapters in parts.items():
        for source in PROVENANCE:
            texts = [chapter.text for chapter in chapters if chapter.source == source]
            print(f"{name:9} {source:9} {len(texts):5} chapters {sum(map(len, texts)):9} characters")


if __name__ == "__main__":
    main()
