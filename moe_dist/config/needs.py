"""Settings of the section `needs`: corpora, tokenizers, runs and files that must exist before a recipe is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_dist.core.paths import PathText
from moe_dist.core.strict import Positive, Strict


class CorpusNeed(Strict):
    """A prepared corpus: shards that launch/prepare_data.py writes."""

    type: Literal["corpus"]
    corpus: str
    out: PathText
    settings: dict[str, str | int] = Field({})  # further arguments of launch/prepare_data.py


class TokenizersNeed(Strict):
    """The tokenizers that launch/train_tokenizers.py trains: one for text and, if `images` is true, one for images."""

    type: Literal["tokenizers"]
    shards: PathText
    out: PathText
    vocab_size: Positive
    images: bool = True  # false if the shards have no images and no image tokenizer is needed


class RunNeed(Strict):
    """An earlier stage, which is a run of another recipe. The run must have completed its last training step."""

    type: Literal["run"]
    recipe: PathText


class FileNeed(Strict):
    """A file for which the Makefile has a rule, so that `make PATH` creates it."""

    type: Literal["file"]
    path: PathText


Need = Annotated[CorpusNeed | TokenizersNeed | RunNeed | FileNeed, Field(discriminator="type")]
