"""Instruction samples from the shard to the token store: reading, encoding and errors."""

import json
from itertools import islice

import numpy as np
import pytest

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.cache.token_cache import build_cache, load_vocabulary, open_store
from moe_dist.data.cache.token_shard import TOKEN_SHARD_FORMAT
from moe_dist.data.shards.tars import Sample, iterate, resolve_shards, write_shards
from moe_dist.data.stream.loader import make_loader
from moe_dist.data.tasks.instructions import sample_hash
from moe_dist.data.tokenizers.text_tokenizer import SentencePieceTokenizer
from moe_dist.data.tokenizers.tokenizer_training import TokenizerRecipe, train_tokenizers

CHOICE = {
    "prompt": "Which is a fruit?\nA. apple\nB. chair\nAnswer:",
    "answer": " A",
    "domain": "choice",
    "question": "Which is a fruit?",
    "options": ["apple", "chair"],
    "correct": 0,
}
ASK = {"prompt": "What is in the picture?\nAnswer:", "answer": " joker", "domain": "emoji", "vendor": "noto"}


@pytest.fixture
def pictures(emoji_samples):
    return [sample.png for sample in emoji_samples[:2]]


@pytest.fixture
def recipe(tokenizers, tmp_path):
    def make(shards=None, **changes) -> DataConfig:
        shards = str(tmp_path / "shards") if shards is None else [str(tmp_path / shard) for shard in shards]
        raw = {"shards": shards, "text_tokenizer": str(tokenizers / "text.model"), "sequence_length": 128}
        return validate(DataConfig, raw | {"image_tokenizer": str(tokenizers / "vq")} | changes, "test", "data")

    return make


def store_of(data):
    vocabulary = load_vocabulary(data)
    build_cache(data, "train", vocabulary)
    return vocabulary, open_store(data, "train", vocabulary)


def write(folder, metas, pngs=None):
    """Write a prepared folder with these training samples."""
    pngs = pngs or [None] * len(metas)
    samples = [Sample(f"s{i}", "train", png, None, meta) for i, (meta, png) in enumerate(zip(metas, pngs, strict=True))]
    write_shards([*samples, Sample("held-out", "validation", None, "held out")], folder)


def test_an_instruction_becomes_prompt_and_answer(recipe, tmp_path, pictures):
    write(tmp_path / "shards", [CHOICE, ASK, ASK], [None, *pictures])
    v, store = store_of(recipe())
    samples = [sample for shard in resolve_shards(str(tmp_path / "shards")) for sample in iterate(shard)]
    assert len(samples) == len(store) == 3 and store.domains == ("choice", "emoji")
    for number, sample in enumerate(samples):
        document, meta = store.document(number), sample.instruction
        prompt, answer = np.split(document.text, [document.prompt.length])
        assert v.text.decode(prompt) == meta.prompt and v.text.decode(document.text) == meta.prompt + meta.answer
        assert prompt.tolist() == v.text.encode(meta.prompt), "the ids of a prompt do not depend on its answer"
        assert [*prompt, *answer] == v.text.encode(meta.prompt + meta.answer)
        assert (document.image is not None) == (meta.domain == "emoji")
        assert (document.prompt.domain, document.prompt.sample) == (meta.domain, sample.hash)
        assert sample.caption is None and 0 <= sample.hash < 2**63
    choice = next(s for s in samples if s.instruction.domain == "choice")
    assert (choice.instruction.options, choice.instruction.correct) == (("apple", "chair"), 0)
    assert choice.hash == sample_hash(CHOICE["prompt"])
    assert len({sample.hash for sample in samples}) == 3, "equal questions about different pictures are two samples"


def test_captions_stay_captions_whatever_else_the_json_says(recipe, tmp_path, pictures):
    samples = [
        Sample("a", "train", pictures[0], "a caption", {"prompt": "made with this"}),
        Sample("b", "train", None, None, {"caption": "another", "answer": 3}),
        Sample("c", "validation", None, "held out"),
    ]
    write_shards(samples, tmp_path / "shards")
    _, store = store_of(recipe())
    assert store.domains == () and [store.document(i).prompt for i in range(2)] == [None, None]


def test_captions_and_instructions_of_two_folders_reach_one_batch(recipe, tmp_path, pictures):
    write(tmp_path / "asks", [ASK | {"domain": f"d{i % 3}"} for i in range(12)], pictures * 6)
    captions = [Sample(f"c{i}", "train", None, f"caption {i}") for i in range(8)]
    write_shards([*captions, Sample("c8", "validation", None, "held out")], tmp_path / "captions")
    data = recipe(["asks", "captions"], lanes=4, group_sequences=2)
    v, store = store_of(data)
    assert store.domains == ("d0", "d1", "d2") and store.part_ends.tolist() == [12, 20]
    batch = next(islice(make_loader(store, v, data, seed=0, dp_rank=0, dp=1, batch_groups=4), 1)).batch
    ends = batch.sidecar["prompt_end_S"]
    assert len(ends) > 8 and set(batch.sidecar["domain_T"][ends].tolist()) <= {0, 1, 2}
    colon = v.text.encode(ASK["prompt"])[-1]
    assert batch.tokens_T[ends].tolist() == [colon] * len(ends)
    answer = batch.tokens_T[ends[0] + 1 :][batch.loss_mask_T[ends[0] : -1]].tolist()
    assert v.text.decode(answer[: answer.index(v.eos)]) == "joker"


def test_an_instruction_longer_than_a_sequence_is_left_out_and_counted(recipe, tmp_path, tokenizers):
    long = CHOICE | {"prompt": "too long " * 40 + "Answer:"}
    write(tmp_path / "shards", [CHOICE, long, CHOICE | {"answer": " B"}])
    with pytest.raises(
        UserError,
        match=r"1 of 3 samples skipped: 1 instruction longer than data.sequence_length=64 "
        r"\(shard-000000.tar number \d\); data.max_bad_fraction=0.01 allows fewer",
    ):
        store_of(recipe(sequence_length=64))
    v, store = store_of(recipe(sequence_length=64, max_bad_fraction=0.5, expect="text"))
    assert len(store) == 2 == len(store.lengths) == store.part_ends[-1]
    texts = {v.text.decode(store.document(i).text) for i in range(2)}
    assert texts == {CHOICE["prompt"] + " A", CHOICE["prompt"] + " B"}
    tokenizer = SentencePieceTokenizer(tokenizers / "text.model")
    ids = len(tokenizer.encode(CHOICE["prompt"] + " A"))
    for length, kept in ((ids + 2, 2), (ids + 1, 0)):  # BOS and EOS take a position each
        store = store_of(recipe(sequence_length=length, max_bad_fraction=1.0, expect="text"))[1]
        assert len(store) == kept, f"{ids} ids and two markers in a sequence of {length}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, r"key 'answer': input should be a valid string"),
        ({"answer": " "}, r"key 'answer': is empty"),
        ({"prompt": 3}, r"key 'prompt': input should be a valid string, got 3"),
        ({"domain": " "}, r"key 'domain': is empty"),
        ({"answer": ...}, r"key 'answer' is missing"),
        ({"prompt": ...}, r"key 'prompt' is missing"),
        ({"correct": 2}, r"correct=2 is not an index into the 2 options"),
        ({"correct": ...}, r"options and correct belong together"),
        ({"options": "ab"}, r"key 'options': "),
        ({"options": ["a"]}, r"key 'options': "),
        ({"correct": -1}, r"key 'correct': "),
    ],
)
def test_a_malformed_sample_is_named_with_its_shard(recipe, tmp_path, change, message):
    meta = {key: value for key, value in (CHOICE | change).items() if value is not ...}
    write(tmp_path / "shards", [CHOICE, meta])
    with pytest.raises(UserError, match=rf"^shard .*shard-000000\.tar, sample 's1': {message}") as error:
        store_of(recipe())
    assert "\n" not in str(error.value)


def test_a_question_about_a_picture_needs_an_image_tokenizer(recipe, tmp_path, pictures):
    write(tmp_path / "shards", [ASK], pictures[:1])
    with pytest.raises(UserError, match=r"sample 's0' asks about a picture: that needs data.image_tokenizer"):
        store_of(recipe(image_tokenizer=None))


def test_another_format_of_the_cache_makes_new_tokens(recipe, tmp_path, monkeypatch):
    write(tmp_path / "shards", [CHOICE])
    data = recipe(expect="text")
    _, store = store_of(data)
    for module in ("token_cache", "token_shard"):
        monkeypatch.setattr(f"moe_dist.data.cache.{module}.TOKEN_SHARD_FORMAT", 1)
    _, old = store_of(data)
    assert old.document(0).text.tolist() == store.document(0).text.tolist()
    manifests = sorted(tmp_path.glob("shards/train/tokens/*/*/manifest.json"))
    assert sorted(json.loads(path.read_text())["format"] for path in manifests) == [1, TOKEN_SHARD_FORMAT]
    monkeypatch.undo()
    next(tmp_path.glob("shards/train/*.tar")).unlink()
    assert len(store_of(data)[1]) == 1, "of shipped tokens those of our format are taken"
    for path in manifests:
        if json.loads(path.read_text())["format"] == TOKEN_SHARD_FORMAT:
            path.unlink()
    with pytest.raises(UserError, match=rf"in format 1, but the recipe names .* in format {TOKEN_SHARD_FORMAT}"):
        store_of(data)


def test_a_text_tokenizer_is_trained_on_prompts_and_answers(tmp_path):
    metas = [{"prompt": f"Question {i}: zebra?", "answer": f" quagga {i}", "domain": "d"} for i in range(30)]
    write(tmp_path / "shards", metas)
    raw = {"shards": str(tmp_path / "shards"), "out": str(tmp_path / "out"), "vocab_size": 320}
    text, _ = train_tokenizers(validate(TokenizerRecipe, raw, "test"))
    assert {"▁zebra", "▁quagga"} <= {piece.rstrip("?") for piece in text.pieces}
