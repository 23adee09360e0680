"""Multiple-choice items read from their shards, with answers given as letters and as texts."""

import pytest

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.shards.tars import Sample, write_shards
from moe_dist.data.tasks.choice_items import Choice, read_choices, read_instructions
from moe_dist.data.tasks.instructions import sample_hash
from moe_dist.data.tokenizers.text_tokenizer import train_text_tokenizer

ITEM = {"domain": "d", "question": "Which is red?", "options": ["sky", "rose", "grass", "sea"], "correct": 1}
LETTER = {**ITEM, "prompt": "Which is red? Answer:", "answer": " B"}
TEXT = {**ITEM, "prompt": "Options: sky, rose, grass, sea. Which is red?", "answer": " rose"}


def shards(folder, *metas, captions=()):
    samples = [Sample(f"i{n}", "train", meta=meta) for n, meta in enumerate(metas)]
    samples += [Sample(f"c{n}", "train", caption=caption) for n, caption in enumerate(captions)]
    write_shards(samples, folder)
    train = str(folder / "train" / "shard-000000.tar")
    raw = {"shards": train, "validation_shards": "unused", "text_tokenizer": "unused"}
    return validate(DataConfig, raw, "test", "data")


@pytest.fixture
def tokenizer(tmp_path):
    texts = [LETTER["prompt"], TEXT["prompt"], " A", " B", " C", " D", " rose", " grass"] * 3
    return train_text_tokenizer(texts, tmp_path / "text.model", vocab_size=290)


def test_options_are_named_as_the_answer_is(tmp_path, tokenizer):
    data = shards(tmp_path / "shards", LETTER, TEXT, captions=["no item"])
    assert {i.prompt for i in read_instructions(data, "train").values()} == {LETTER["prompt"], TEXT["prompt"]}
    choices, report = read_choices(data, "train", tokenizer)
    assert (report.total, report.bad.total()) == (2, 0)

    def first(*names):
        return tuple(tokenizer.encode(f": {name}")[len(tokenizer.encode(":")) :][0] for name in names)

    assert choices[sample_hash(LETTER["prompt"])] == Choice(first(*"ABCD"), 1)
    assert choices[sample_hash(TEXT["prompt"])] == Choice(first(*ITEM["options"]), 1)


def test_what_is_no_item_is_named(tmp_path, tokenizer):
    for number, (meta, message) in enumerate(
        (
            ({**TEXT, "answer": " sky"}, "its answer ' sky' is neither the letter nor the text of its correct option"),
            ({"prompt": "Say so.", "answer": " B", "domain": "d"}, "the sample 'Say so....' is not a multiple-choice"),
            ({**TEXT, "prompt": "?", "options": ["sky", "rose"]}, "have 2 or 4 options, but all must have"),
        )
    ):
        data = shards(tmp_path / str(number), LETTER, meta)
        with pytest.raises(UserError, match=message):
            read_choices(data, "train", tokenizer)


def test_items_with_one_prompt_and_different_options_are_left_out(tmp_path, tokenizer):
    """Their sample hash does not tell them apart. A copy of an item changes nothing."""
    prompts = [f"{n} {TEXT['prompt']}" for n in range(4)]
    metas = [TEXT | {"prompt": prompt} for prompt in prompts]
    metas += [metas[0], metas[1] | {"options": ["rose", "sky", "grass", "sea"], "correct": 0}]
    data = shards(tmp_path / "s", *metas).model_copy(update={"max_bad_fraction": 0.25})
    choices, report = read_choices(data, "train", tokenizer)
    assert choices.keys() == {sample_hash(prompts[n]) for n in (0, 2, 3)}
    assert report.summary().startswith(
        "1 of 4 samples skipped: 1 items with the same prompt and different options ('1 "
    )
    with pytest.raises(UserError, match=r"different options.*data\.max_bad_fraction=0.2 allows fewer"):
        read_choices(data.model_copy(update={"max_bad_fraction": 0.2}), "train", tokenizer)
