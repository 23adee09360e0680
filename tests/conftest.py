"""Fixtures for every test: the small real corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_dist.data.corpora.emoji import base_concept
from moe_dist.data.shards import Sample, split_of, write_shards

EMOJI = Path(__file__).parent / "fixtures" / "emoji"


@pytest.fixture(scope="session")
def emoji_samples() -> list[Sample]:
    """196 real image-caption pairs of 88 concepts (60 train, 14 validation, 14 test), see fixtures/emoji/NOTICE.md."""
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


@pytest.fixture(scope="session")
def emoji_shards(emoji_samples, tmp_path_factory) -> Path:
    """The pairs as a prepared folder: 132 train, 32 validation and 32 test samples in shards of at most 16."""
    folder = tmp_path_factory.mktemp("emoji") / "shards"
    write_shards(emoji_samples, folder, samples_per_shard=16)
    return folder
