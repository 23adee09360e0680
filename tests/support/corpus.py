"""The small real corpus of the tests: 196 emoji with captions, and tokenizers trained on it briefly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_dist.corpora.emoji import base_concept
from moe_dist.data.shards.samples import decode_image
from moe_dist.data.shards.tars import Sample, split_of, write_shards
from moe_dist.data.tokenizers.pixels import crop_and_resize
from moe_dist.data.tokenizers.text_tokenizer import train_text_tokenizer
from moe_dist.data.tokenizers.vq import VQConfig
from moe_dist.data.tokenizers.vq_training import VQTraining, train_vq
from tests.support import ROOT

EMOJI = ROOT / "tests" / "fixtures" / "emoji"


def read_emoji() -> list[Sample]:
    """Read 196 real image-caption pairs of 88 concepts (60 train, 14 validation, 14 test), see
    fixtures/emoji/NOTICE.md.
    """
    captions = json.loads((EMOJI / "captions.json").read_text())
    return [
        Sample(
            key=f"{vendor}-{code.lower()}",
            split=split_of(base_concept(code)),
            png=(EMOJI / vendor / f"{code.lower()}.png").read_bytes(),
            caption=caption,
            meta={"vendor": vendor, "code": code, "concept": base_concept(code)},
        )
        for vendor in ("noto", "fluent")
        for code, caption in captions.items()
    ]


def write_emoji_shards(samples: Sequence[Sample], folder: Path) -> Path:
    """Write a prepared folder: 132 train, 32 validation and 32 test samples in shards of at most 16."""
    write_shards(list(samples), folder, samples_per_shard=16)
    return folder


def train_tokenizers(samples: Sequence[Sample], folder: Path, names: Sequence[str] = ("vq",)) -> Path:
    """Train text.model (400 ids) and an image tokenizer for each name, in `folder`."""
    train_text_tokenizer([sample.caption for sample in samples], folder / "text.model", vocab_size=400)
    pixels = np.stack([crop_and_resize(decode_image(sample.png), 32) for sample in samples])
    small = VQConfig(image_size=32, codebook_size=32, code_width=8, channels=(8, 16), blocks=1)
    for seed, name in enumerate(names):
        train_vq(pixels, small, VQTraining(steps=5, seed=seed)).save(folder / name)
    return folder


def write_corpus(folder: str) -> None:
    """Write `folder`/shards and `folder`/tokenizers."""
    samples, tokenizers = read_emoji(), Path(folder) / "tokenizers"
    tokenizers.mkdir(parents=True)
    write_emoji_shards(samples, Path(folder) / "shards")
    train_tokenizers(samples, tokenizers)
