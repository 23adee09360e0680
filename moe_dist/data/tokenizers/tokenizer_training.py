"""Training of both tokenizers on a corpus's shards: SentencePiece on the texts, our VQ tokenizer on the images.

The files are written to the folder that the setting `out` names:
  text.model              the SentencePiece model, for data.text_tokenizer
  vq/                     the image tokenizer (config.json, model.safetensors), for data.image_tokenizer
  vq/quality.json         reconstruction and codebook use on held-out images
  vq/reconstructions.png  rows of held-out images, each row above its reconstructions
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from moe_dist.core.paths import Paths, PathText
from moe_dist.core.strict import Fraction, Positive, Strict
from moe_dist.data.shards.sample_report import SampleReport
from moe_dist.data.shards.samples import RawSample
from moe_dist.data.shards.tars import Shard, Split, iterate, resolve_shards, verify_shards
from moe_dist.data.tokenizers.pixels import crop_and_resize
from moe_dist.data.tokenizers.text_tokenizer import VOCAB_SIZE, SentencePieceTokenizer, train_text_tokenizer
from moe_dist.data.tokenizers.vq import VQConfig
from moe_dist.data.tokenizers.vq_training import VQQuality, VQTraining, measure, reconstruction_grid, train_vq

HELD_OUT_IMAGES = 512
GRID_IMAGES = 96


class TokenizerRecipe(Strict):
    """Settings of launch/train_tokenizers.py."""

    shards: Paths  # as data.shards
    out: PathText
    vocab_size: Positive = VOCAB_SIZE
    vq: VQConfig = VQConfig()
    training: VQTraining = VQTraining()
    max_bad_fraction: Fraction = 0.01  # as data.max_bad_fraction


def train_tokenizers(recipe: TokenizerRecipe) -> tuple[SentencePieceTokenizer, VQQuality | None]:
    """Train and write both tokenizers, or the text tokenizer alone if the corpus has no images.

    Returns the text tokenizer, and the quality of the image tokenizer on held-out images. The quality is None if there
    is no image tokenizer or no held-out image.
    Raises UserError if a shard is damaged, if too many samples are damaged, if the corpus has no text or fewer images
    than one batch, or if the image tokenizer's loss becomes non-finite.
    """
    out = Path(recipe.out)
    texts, images = _read(recipe, "train", recipe.training.max_images)
    text = train_text_tokenizer(texts, out / "text.model", recipe.vocab_size)
    if images is None:
        return text, None
    tokenizer = train_vq(images, recipe.vq, recipe.training)
    _, held_out = _read(recipe, "validation", HELD_OUT_IMAGES)
    folder = out / "vq"
    tokenizer.save(folder)
    if held_out is None:
        return text, None
    quality = measure(tokenizer, held_out)
    (folder / "quality.json").write_text(json.dumps(asdict(quality), indent=1) + "\n")
    reconstruction_grid(tokenizer, held_out[:GRID_IMAGES]).save(folder / "reconstructions.png")
    return text, quality


def _read(recipe: TokenizerRecipe, split: Split, max_images: int) -> tuple[list[str], np.ndarray | None]:
    """Read all texts of a split (captions, prompts, answers) and its first max_images images.

    Returns the texts, and the images as a uint8 array [N, H, W, 3]. If the split has no images, the array is None.
    """
    shards = resolve_shards(recipe.shards, split)
    verify_shards(shards)
    report = SampleReport()
    texts: list[str] = []
    images: list[np.ndarray] = []
    for sample in _samples(shards, report):
        texts += sample.texts
        if sample.image is not None and len(images) < max_images:
            images.append(crop_and_resize(sample.image, recipe.vq.image_size))
    if split == "train":  # held-out samples only measure the quality
        report.check_samples(split)
    report.check(recipe.max_bad_fraction)
    if report.bad or report.lost:
        print(f"warning: {split}: {report.summary()}", file=sys.stderr, flush=True)
    return texts, np.stack(images) if images else None


def _samples(shards: list[Shard], report: SampleReport) -> Iterator[RawSample]:
    for shard in shards:
        yield from iterate(shard, report)
