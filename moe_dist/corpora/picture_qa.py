"""Instruction samples about the images of other corpora.

A question asks for the name of the thing in an image, or for the group that the image belongs to, such as animals.
There are two corpora with different images and words: emoji_qa (domain "emoji") and clipart_qa (domain "clipart"). Each
image is in the same split as in its corpus of image-caption pairs (emoji or clipart), because the split is derived from
the image's concept in both cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from moe_dist.core.strict import Positive, Strict
from moe_dist.corpora import clipart, emoji
from moe_dist.data.shards.tars import Sample

QUESTIONS = {"name": "What is in the picture?", "group": "Which group does the picture belong to?"}
NO_GROUPS = {"special", "unsorted"}  # clip art folders whose name is not a group


class EmojiQA(Strict):
    """Corpus of questions about emoji.

    size: the width and height of the images in pixels.
    base: whether to leave out skin-tone variants.
    """

    licence: ClassVar[str] = emoji.Emoji.licence

    size: Positive = 64
    base: bool = True

    def fetch(self, downloads: Path) -> None:
        emoji.Emoji().fetch(downloads)

    def entries(self, downloads: Path) -> list[tuple[str, emoji.EmojiEntry]]:
        pictures = emoji.Emoji(size=self.size, base=self.base).entries(downloads)
        return [(kind, picture) for picture in pictures for kind in QUESTIONS]

    def sample(self, entry: tuple[str, emoji.EmojiEntry]) -> Sample:
        kind, picture = entry
        answers = {"name": picture.meta["label"], "group": picture.meta["group"]}
        return _ask(emoji.Emoji(size=self.size).sample(picture), kind, answers, "emoji")


class ClipArtQA(Strict):
    """Corpus of questions about clip art. size: the width and height of the images in pixels."""

    licence: ClassVar[str] = clipart.ClipArt.licence

    size: Positive = 64

    def fetch(self, downloads: Path) -> None:
        clipart.ClipArt().fetch(downloads)

    def entries(self, downloads: Path) -> list[tuple[str, clipart.ClipartEntry]]:
        pictures = clipart.ClipArt(size=self.size).entries(downloads)
        return [(kind, picture) for picture in pictures for kind in QUESTIONS]

    def sample(self, entry: tuple[str, clipart.ClipartEntry]) -> Sample | None:
        kind, picture = entry
        if kind == "group" and picture.folders[0] in NO_GROUPS:
            return None
        pair = clipart.ClipArt(size=self.size).sample(picture)
        answers = {"name": picture.title, "group": picture.folders[0].replace("_", " ")}
        return pair and _ask(pair, kind, answers, "clipart")


def _ask(pair: Sample, kind: str, answers: Mapping[str, str], domain: str) -> Sample:
    """Turn an image-caption pair into an instruction: the same image, with a question and its answer as the text.

    kind: the kind of question, a key of QUESTIONS.
    answers: the answer to each kind of question.
    """
    meta: dict[str, Any] = {
        "prompt": f"{QUESTIONS[kind]}\nAnswer:",
        "answer": f" {answers[kind]}",
        "domain": domain,
        "question": QUESTIONS[kind],
        "concept": pair.meta["concept"],
    }
    return replace(pair, key=f"{pair.key}-{kind}", caption=None, meta=meta)
