"""A Hugging Face tokenizer folder: ids as in transformers, its own special tokens, and no new entries for text."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.cache.token_cache import load_vocabulary
from moe_dist.data.tokenizers.hugging_face_text import HuggingFaceTokenizer
from moe_dist.data.tokenizers.text_tokenizer import SentencePieceTokenizer, load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary

TEXTS = ["a small red bear on the hill", "a large green boat on the river", "Ünïcode ﬁ ½ 🙂", "two  blanks \n"]
SPECIAL = ["<|end|>", "<|start|>", "<|pad|>"]


def save(folder, **named):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "tokenizer", bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>")


@pytest.mark.parametrize("text", [*TEXTS, "", "never seen: zebra"])
def test_ids_are_those_of_transformers_and_come_back_as_text(text, folder):
    ours, theirs = load_text_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert isinstance(ours, HuggingFaceTokenizer)
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == text


def test_special_tokens_are_the_tokenizers_own_and_never_come_from_text(folder):
    ours = HuggingFaceTokenizer(folder)
    assert (ours.eos, ours.bos, ours.pad) == (0, 1, 2)
    ids = ours.encode("a <|end|> of <|start|>")
    assert not {0, 1, 2} & set(ids) and ours.decode(ids) == "a <|end|> of <|start|>"
    assert ours.decode([1, *ours.encode("a bear"), 0]) == "a bear"


def test_a_text_vocabulary_is_the_tokenizers_to_the_entry(folder):
    data = validate(DataConfig, {"shards": "unused", "text_tokenizer": str(folder)}, "test")
    vocabulary = load_vocabulary(data)
    assert vocabulary.size == 300 == HuggingFaceTokenizer(folder).size
    assert (vocabulary.eos, vocabulary.bos, vocabulary.pad, vocabulary.boi) == (0, 1, 2, None)


def test_missing_special_tokens(tmp_path):
    """eos is used for a missing pad; the vocabulary adds a missing bos or eos."""
    ours = HuggingFaceTokenizer(save(tmp_path / "a", eos_token="<|end|>"))
    assert (ours.bos, ours.eos, ours.pad) == (None, 0, 0)
    vocabulary = Vocabulary(ours)
    assert (vocabulary.bos, vocabulary.pad, vocabulary.size) == (300, 0, 301)
    assert Vocabulary(HuggingFaceTokenizer(save(tmp_path / "b"))).size == 303


def test_older_folders_name_their_tokens_elsewhere_and_with_settings(folder):
    (folder / "tokenizer_config.json").unlink()
    assert HuggingFaceTokenizer(folder).eos is None
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end|>", "lstrip": False}}))
    assert HuggingFaceTokenizer(folder).eos == 0


def test_the_digest_tells_tokenizers_apart(folder, tmp_path):
    other = save(tmp_path / "other", bos_token="<|start|>", eos_token="<|pad|>")
    digests = [HuggingFaceTokenizer(path).sha256 for path in (folder, folder, other)]
    assert digests[0] == digests[1] != digests[2]


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_text_tokenizer(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<nowhere>"}))
    with pytest.raises(UserError, match=r"names the special token '<nowhere>', which its tokenizer\.json lacks"):
        load_text_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        load_text_tokenizer(folder)


def test_a_file_is_a_sentencepiece_model(tokenizers):
    assert isinstance(load_text_tokenizer(tokenizers / "text.model"), SentencePieceTokenizer)
