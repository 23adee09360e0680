"""End-to-end test of the command that trains both tokenizers, on real shards."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from moe_dist.config.recipe import DataConfig
from moe_dist.core.strict import validate
from moe_dist.data.cache.token_cache import build_cache, load_vocabulary, open_store
from moe_dist.data.shards.tars import Sample, split_of, write_shards
from moe_dist.data.tokenizers.tokenizer_training import TokenizerRecipe, train_tokenizers
from tests.support import ROOT

SMALL = [
    "vocab_size=400",
    "vq.image_size=32",
    "vq.codebook_size=32",
    "vq.channels=[8, 16]",
    "vq.blocks=1",
    "training.steps=10",
]


def run(*arguments):  # its imports take seconds, so only for tests of the command itself
    command = [sys.executable, "launch/train_tokenizers.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_both_tokenizers_are_written_and_usable(emoji_shards, tmp_path):
    done = run(f"shards={emoji_shards}", f"out={tmp_path}", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "400 pieces" in done.stdout and "psnr" in done.stdout
    quality = json.loads((tmp_path / "vq" / "quality.json").read_text())
    assert quality["images"] == 32 and quality["psnr"] > 5 and quality["codes_used"] > 1
    assert Image.open(tmp_path / "vq" / "reconstructions.png").size == (16 * 32, 4 * 32)
    raw = {"shards": str(emoji_shards), "text_tokenizer": f"{tmp_path}/text.model", "image_tokenizer": f"{tmp_path}/vq"}
    data = validate(DataConfig, raw, "test")
    vocabulary = load_vocabulary(data)
    build_cache(data, "test", vocabulary)
    assert len(open_store(data, "test", vocabulary)) == 32
    assert vocabulary.size == 400 + 2 + 32


def test_a_corpus_of_texts_gets_a_text_tokenizer_only(tmp_path):
    samples = [Sample(str(i), "train", caption=f"line {i} of a text about bears") for i in range(50)]
    write_shards(samples, tmp_path / "shards")
    raw = {"shards": str(tmp_path / "shards"), "out": str(tmp_path / "out"), "vocab_size": 290}
    text, quality = train_tokenizers(validate(TokenizerRecipe, raw, "test"))
    assert text.size == 290 and quality is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["text.model"]


def test_a_flat_folder_may_hold_out_no_sample(emoji_samples, tmp_path):
    samples = [Sample(s.key, "train", s.png, s.caption) for s in emoji_samples if split_of(s.key) == "train"]
    write_shards(samples, tmp_path / "shards")
    (tmp_path / "shards" / "train").rename(tmp_path / "flat")
    vq = {"image_size": 32, "codebook_size": 32, "channels": [8, 16], "blocks": 1}
    raw = {"shards": str(tmp_path / "flat"), "out": str(tmp_path / "out"), "vocab_size": 400, "vq": vq}
    text, quality = train_tokenizers(validate(TokenizerRecipe, raw | {"training": {"steps": 2}}, "test"))
    assert text.size == 400 and quality is None
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == [
        *("config.json", "model.safetensors", "text.model")
    ]


def test_a_wrong_key_is_one_sentence_and_status_2():
    done = run("shards=x", "out=x", "training.step=3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "unknown key 'training.step' (did you mean 'steps'?)" in done.stderr
