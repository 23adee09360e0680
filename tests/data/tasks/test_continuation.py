"""Ids of a prompt and its answer under every family of tokenizers, compared with lm-evaluation-harness' rule."""

import json
import random
from functools import cache

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.cache.token_cache import build_cache, load_vocabulary, open_store
from moe_dist.data.shards.tars import Sample, write_shards
from moe_dist.data.tasks.choice_items import read_choices
from moe_dist.data.tasks.instructions import NoBoundary, instruction_ids, sample_hash
from moe_dist.data.tokenizers.hugging_face_text import HuggingFaceTokenizer
from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer, train_text_tokenizer

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
LLAMA_3 = WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
TEXTS = [
    "Which is red?\nA. sky\nB. rose\nAnswer: A",
    "Answer: B",
    "Answer: C",
    "Answer: D",
    "Answer:\nYes",
    "a rose",
] * 4
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PLAIN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), PLAIN_BYTES])


def trained(pre_tokenizer, alphabet=()):
    tokenizer = Tokenizer(models.BPE(byte_fallback=not alphabet, unk_token=None if alphabet else "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    special = [] if alphabet else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def prepend():
    """Build a tokenizer as those of Llama 2 and Mixtral: the normalizer writes blanks and one before the text."""
    trained_one = json.loads(trained(pre_tokenizers.Metaspace()).to_str())
    trained_one["added_tokens"] = trained_one["added_tokens"][:1]
    tokenizer = Tokenizer.from_str(json.dumps(trained_one | {"pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def metaspace():
    trained_one = json.loads(trained(pre_tokenizers.Metaspace()).to_str())
    trained_one["added_tokens"] = trained_one["added_tokens"][:1]
    tokenizer = Tokenizer.from_str(json.dumps(trained_one))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return tokenizer


def byte_level(pre_tokenizer):
    tokenizer = trained(pre_tokenizer, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


FAMILIES = {
    "sentencepiece": None,
    "prepend": prepend,
    "metaspace": metaspace,
    "byte level": lambda: byte_level(BYTES),
    "llama 3": lambda: byte_level(split(LLAMA_3)),
    "qwen": lambda: byte_level(split(QWEN)),
    "digits": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])),
}


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    """Return a function that gives the path of a family's tokenizer, as data.text_tokenizer names it."""

    @cache
    def make(family):
        folder = tmp_path_factory.mktemp("tokenizer")
        if FAMILIES[family] is None:
            train_text_tokenizer(TEXTS, folder / "text.model", vocab_size=340)
            return folder / "text.model"
        FAMILIES[family]().save(str(folder / "tokenizer.json"))
        return folder

    return make


def harness_ids(tokenizer, prompt, answer):
    """The rule of lm-evaluation-harness, written down from its definition; it does not notice a merge."""
    while prompt[-1].isspace():
        prompt, answer = prompt[:-1], prompt[-1] + answer
    before = tokenizer.encode(prompt)
    return before, tokenizer.encode(prompt + answer)[len(before) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_joined_text(path_of, family):
    """300 random prompts and answers: the harness' ids, which are those of the joined text, or a merge."""
    tokenizer, draw = load_text_tokenizer(path_of(family)), random.Random(family)
    merged = 0
    for _ in range(300):
        prompt, answer = (
            "".join(draw.choices(["A", "n", "rose", "Answer:", "7", " ", "\n", "é", "?"], k=6)) for _ in "12"
        )
        if prompt.lstrip() != prompt or not answer.strip():
            continue
        before, after = harness_ids(tokenizer, prompt, answer)
        joined = tokenizer.encode(prompt + answer)
        if before + after != joined:
            merged += 1
            with pytest.raises(NoBoundary, match="prompt and answer merge"):
                instruction_ids(tokenizer, prompt, answer)
            continue
        assert instruction_ids(tokenizer, prompt, answer) == (before, after)
        assert tokenizer.decode(before + after) == prompt + answer
    assert merged < 150


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prompt", "answer"), [("Answer:", " A"), ("Answer: ", "A")])
def test_a_blank_belongs_to_the_answer_wherever_it_is_written(path_of, family, prompt, answer):
    tokenizer = load_text_tokenizer(path_of(family))
    before, after = instruction_ids(tokenizer, prompt, answer)
    assert before == tokenizer.encode("Answer:") and before + after == tokenizer.encode("Answer: A")
    assert tokenizer.decode(before + after) == "Answer: A", "no second blank"


@pytest.mark.parametrize("family", ["prepend", "metaspace"])
def test_an_answer_without_a_blank_gets_none(path_of, family):
    tokenizer = load_text_tokenizer(path_of(family))
    before, after = instruction_ids(tokenizer, "é", "?")
    assert tokenizer.decode(before + after) == "é?" and after != tokenizer.encode("?")


def test_a_prompt_and_an_answer_that_share_a_token_merge(path_of):
    tokenizer = load_text_tokenizer(path_of("llama 3"))
    with pytest.raises(NoBoundary, match="prompt and answer merge"):
        instruction_ids(tokenizer, "Answ", "er:")


def test_an_answer_that_the_tokenizer_drops(path_of, tmp_path):
    tokenizer = Tokenizer.from_file(str(path_of("llama 3") / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(NoBoundary, match="the tokenizer drops the answer"):
        instruction_ids(HuggingFaceTokenizer(tmp_path), "Answer:", "\u200b")


# ------------------------------------------------------------------------------------------------ shards and items


def data_of(folder, tokenizer, metas, **settings):
    samples = [Sample(f"s{i}", "train", meta={"domain": "d"} | meta) for i, meta in enumerate(metas)]
    write_shards(samples, folder)
    raw = {"shards": str(folder / "train" / "shard-000000.tar"), "validation_shards": "unused"}
    return validate(DataConfig, raw | {"text_tokenizer": str(tokenizer)} | settings, "test", "data")


def item(prompt, options, correct, answer):
    return {"prompt": prompt, "options": options, "correct": correct, "answer": answer}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["Which is red?\nAnswer:", "Which is red?\nAnswer: "])
def test_the_letters_of_an_item_begin_differently(path_of, tmp_path, family, prompt):
    """The tokens of an item's options are those that training puts after the prompt."""
    blank = "" if prompt.endswith(" ") else " "
    metas = [item(f"{i} {prompt}", ["sky", "rose", "sea", "hay"], i, blank + "ABCD"[i]) for i in range(4)]
    data = data_of(tmp_path, path_of(family), metas)
    vocabulary = load_vocabulary(data)
    choices, _ = read_choices(data, "train", vocabulary.text)
    build_cache(data, "train", vocabulary)
    store = open_store(data, "train", vocabulary)
    assert len(store) == len(choices) == 4
    for document in map(store.document, range(4)):
        choice = choices[document.prompt.sample]
        assert len(set(choice.tokens)) == 4 and not choice.ambiguous
        assert document.text[document.prompt.length] == choice.tokens[choice.correct]


def test_a_merged_sample_is_counted_and_named(path_of, tmp_path):
    metas = [{"prompt": f"{i} Answer:", "answer": " A"} for i in range(4)] + [{"prompt": "5 Answ", "answer": "er: A"}]
    data = data_of(tmp_path, path_of("llama 3"), metas, max_bad_fraction=0.2)
    vocabulary = load_vocabulary(data)
    build_cache(data, "train", vocabulary)
    store = open_store(data, "train", vocabulary)
    assert len(store) == 4 and store.report.total == 5
    assert store.report.summary() == "1 of 5 samples skipped: 1 prompt and answer merge (s4)"
    with pytest.raises(UserError, match=r"1 prompt and answer merge \(s4\); data.max_bad_fraction=0.1 allows fewer"):
        open_store(data.model_copy(update={"max_bad_fraction": 0.1}), "train", vocabulary)


def test_an_item_whose_prompt_and_option_merge_is_left_out(path_of, tmp_path):
    metas = [item(f"{i} Answer:", ["A", "rose"], 0, " A") for i in range(4)] + [item("Answ", ["er:", "?"], 1, "?")]
    data = data_of(tmp_path, path_of("llama 3"), metas, max_bad_fraction=0.2)
    choices, report = read_choices(data, "train", load_text_tokenizer(data.text_tokenizer))
    assert choices.keys() == {sample_hash(f"{i} Answer:") for i in range(4)}
    assert report.summary() == "1 of 5 samples skipped: 1 prompt and answer merge ('Answ...')"
    with pytest.raises(UserError, match="allows fewer"):
        data = data.model_copy(update={"max_bad_fraction": 0.1})
        read_choices(data, "train", load_text_tokenizer(data.text_tokenizer))


@pytest.mark.parametrize("family", ["digits", "llama 3"])
def test_items_whose_options_all_begin_alike_are_refused(path_of, tmp_path, family):
    """These tokenizers write the blank before a digit as a token of its own."""
    metas = [item(f"1 + {i} =", [str(n) for n in (1, 2, 3, 4)], i, f" {i + 1}") for i in range(4)]
    tokenizer = load_text_tokenizer(path_of(family))
    with pytest.raises(UserError, match="in every multiple-choice item the correct option begins with the same token"):
        read_choices(data_of(tmp_path / "a", path_of(family), metas), "train", tokenizer)
    metas.append(item("Which?", ["rose", "sky"], 1, " sky") | {"options": ["rose", "sky", "7", "?"]})
    choices, _ = read_choices(data_of(tmp_path / "b", path_of(family), metas), "train", tokenizer)
    assert sum(choice.ambiguous for choice in choices.values()) == 4 and len(choices) == 5


def test_the_own_tokenizers_never_merge_across_a_blank(tokenizers, emoji_samples):
    """Pieces of tokenizers trained here hold a blank at their beginning only, so prompt and answer have ids apart."""
    tokenizer = load_text_tokenizer(tokenizers / "text.model")
    for caption in {sample.caption for sample in emoji_samples}:
        prompt = f"What is '{caption}'?\nAnswer:"
        assert instruction_ids(tokenizer, prompt, f" {caption}") == (
            tokenizer.encode(prompt),
            tokenizer.encode(caption),
        )
