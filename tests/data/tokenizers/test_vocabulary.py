"""The vocabulary: every id has one meaning and one modality, and the fingerprint distinguishes tokenizers."""

import hashlib
from types import SimpleNamespace

import pytest
import torch

from moe_dist.core.batch import IMAGE, TEXT
from moe_dist.data.tokenizers.text_tokenizer import train_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary


def text_tokenizer(size=100, pad=None, bos=None, eos=None, content="text"):
    return SimpleNamespace(size=size, pad=pad, bos=bos, eos=eos, sha256=hashlib.sha256(content.encode()).hexdigest())


def image_tokenizer(codebook_size=16, content="image"):
    digest = hashlib.sha256(content.encode()).hexdigest()
    return SimpleNamespace(codebook_size=codebook_size, image_size=64, sha256=digest)


@pytest.mark.parametrize(
    "own, expected",
    [
        ({"pad": 0, "bos": 2, "eos": 3}, (0, 2, 3, 100, 101)),
        ({"bos": 1, "eos": 2}, (100, 1, 2, 101, 102)),  # as in a Llama .model, without pad
        ({}, (100, 101, 102, 103, 104)),
    ],
)
def test_markers_are_the_models_own_or_appended(own, expected):
    v = Vocabulary(text_tokenizer(**own), image_tokenizer())
    assert (v.pad, v.bos, v.eos, v.boi, v.eoi) == expected
    assert v.first_image_code == max(expected) + 1 and v.size == v.first_image_code + 16


def test_a_token_is_image_iff_it_is_a_code():
    v = Vocabulary(text_tokenizer(), image_tokenizer())
    assert v.modality_of.shape == (v.size,) and v.modality_of.dtype == torch.int64
    codes = v.image_code(torch.arange(16))
    assert v.image_code(3) == codes[3] and codes[-1] == v.size - 1
    assert (v.modality_of[codes] == IMAGE).all() and (v.modality_of == IMAGE).sum() == 16
    assert (v.modality_of[[0, 99, v.pad, v.bos, v.eos, v.boi, v.eoi]] == TEXT).all()


def test_without_an_image_tokenizer_everything_is_text():
    v = Vocabulary(text_tokenizer())
    assert v.size == 103 and (v.modality_of == TEXT).all() and (v.boi, v.eoi) == (None, None)


def test_the_fingerprint_is_that_of_both_tokenizers():
    def fingerprint(text="text", image="image"):
        return Vocabulary(text_tokenizer(content=text), image_tokenizer(content=image)).fingerprint()

    assert fingerprint() == fingerprint()
    others = {
        fingerprint(),
        fingerprint(text="other"),
        fingerprint(image="other"),
        Vocabulary(text_tokenizer()).fingerprint(),
    }
    assert len(others) == 4


def test_with_a_real_text_tokenizer(tmp_path):
    text = train_text_tokenizer(["red bear", "red boat"], tmp_path / "text.model", vocab_size=270)
    v = Vocabulary(text, image_tokenizer())
    assert [text.pieces[i] for i in (v.pad, v.bos, v.eos)] == ["<pad>", "<s>", "</s>"]
    assert v.size == text.size + 2 + 16
    assert "64 x 64, 16 codes" in v.describe() and text.sha256[:8] in v.describe()
