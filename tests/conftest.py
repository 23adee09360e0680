"""Fixtures for every test: the small real corpus."""

from __future__ import annotations

import os

# The tests run on CPU with gloo. On a machine with a GPU, DeepSpeed would choose CUDA: here, and in the workers, ranks
# and subprocesses, which inherit these variables. Nothing that may import torch is imported before.
os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_dist.data.shards.tars import Sample
from moe_dist.data.tokenizers.text_tokenizer import train_text_tokenizer
from tests.support.corpus import read_emoji, train_tokenizers, write_emoji_shards
from tests.support.long import THREADS

torch.set_num_threads(THREADS)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which is not needed where files are run by hand
def pytest_xdist_make_scheduler(config, log):
    """Among parallel workers a file stays with one worker, and all of Slurm's with one: they share a cluster."""
    scheduling = importlib.import_module("xdist.scheduler")

    class ByFile(scheduling.LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "slurm" if file.startswith("tests/slurm/") else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def emoji_samples() -> list[Sample]:
    """196 real image-caption pairs of 88 concepts (60 train, 14 validation, 14 test)."""
    return read_emoji()


@pytest.fixture(scope="session")
def emoji_shards(emoji_samples, tmp_path_factory) -> Path:
    """The pairs as a prepared folder: 132 train, 32 validation and 32 test samples in shards of at most 16."""
    return write_emoji_shards(emoji_samples, tmp_path_factory.mktemp("emoji") / "shards")


@pytest.fixture(scope="session")
def tokenizers(emoji_samples, tmp_path_factory) -> Path:
    """A folder of two text tokenizers, text.model and other.model, and two small image tokenizers, vq and other_vq."""
    folder = train_tokenizers(emoji_samples, tmp_path_factory.mktemp("tokenizers"), ("vq", "other_vq"))
    train_text_tokenizer([sample.caption for sample in emoji_samples], folder / "other.model", vocab_size=380)
    return folder


@pytest.fixture(scope="session")
def small_run(emoji_shards, tokenizers) -> Callable[[Path], list[str]]:
    """Of a folder: the overrides that make of the quickstart a small run in it.

    The same model and launcher, the fixtures' pairs, eight steps.
    """
    return lambda folder: [
        f"run.dir={folder / 'run'}",
        f"data.shards={shutil.copytree(emoji_shards, folder / 'shards')}",
        f"data.text_tokenizer={tokenizers / 'text.model'}",
        f"data.image_tokenizer={tokenizers / 'vq'}",
        *["data.sequence_length=128", "data.group_sequences=2", "data.lanes=4"],
        "data.max_bad_fraction=0.1",  # two captions are cut
        *["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.ffn.hidden_size=32"],
        *["train.steps=8", "schedule.warmup_steps=2", "eval.every=4", "eval.groups=2", "checkpoint.every=4"],
    ]


@pytest.fixture
def overrides(small_run, tmp_path) -> list[str]:
    """A small run in the test's own folder."""
    return small_run(tmp_path)
