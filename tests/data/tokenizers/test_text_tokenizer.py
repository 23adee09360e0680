"""SentencePiece: lossless and deterministic; errors for small corpora and for files that are not models."""

import logging

import pytest

from moe_dist.core.errors import UserError
from moe_dist.data.tokenizers.text_tokenizer import SentencePieceTokenizer, train_text_tokenizer

TEXTS = [
    f"a {size} {color} {thing} on the {place}"
    for size in ("small", "large")
    for color in ("red", "green", "blue")
    for thing in ("bear", "tree", "boat", "kite")
    for place in ("hill", "river", "table", "moon")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_text_tokenizer(TEXTS, tmp_path_factory.mktemp("text") / "text.model", vocab_size=300)


@pytest.mark.parametrize("text", ["a small red bear", "Ünïcode ﬁ ½ 🙂 never seen", "two  blanks ", "a\nb", "<s></s>"])
def test_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.pad, tokenizer.bos, tokenizer.eos} & set(ids)


def test_frequent_words_are_few_pieces(tokenizer):
    text = "a small red bear on the river"
    assert len(tokenizer.encode(text)) < 2 / 3 * len(text)


def test_training_is_bitwise_repeatable(tokenizer, tmp_path):
    again = train_text_tokenizer(iter(TEXTS), tmp_path / "deep" / "text.model", vocab_size=300)
    assert again.sha256 == tokenizer.sha256
    assert again.pieces == tokenizer.pieces and len(again.pieces) == again.size == 300


def test_too_small_a_corpus_gives_fewer_pieces_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        small = train_text_tokenizer(["red bear", "red boat"], tmp_path / "text.model", vocab_size=4096)
    assert 256 < small.size < 300  # byte pieces are always included
    assert f"too few for 4096 pieces: the text tokenizer has {small.size}" in caplog.text
    assert small.decode(small.encode("red boat")) == "red boat"


def test_long_lines_are_not_left_out(tmp_path):
    long = "zyx " * 5000
    tokenizer = train_text_tokenizer([long], tmp_path / "text.model", vocab_size=270)
    assert any("zyx" in piece for piece in tokenizer.pieces)


def test_a_vocabulary_below_the_byte_pieces_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="100 pieces"):
        train_text_tokenizer(TEXTS, tmp_path / "text.model", vocab_size=100)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.model"):
        SentencePieceTokenizer(tmp_path / "nowhere.model")
    (tmp_path / "broken.model").write_bytes(b"no protobuf")
    with pytest.raises(UserError, match=r"broken\.model is not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "broken.model")
    with pytest.raises(UserError, match="no captions"):
        train_text_tokenizer(["", " \n"], tmp_path / "text.model")
