"""From JSONL and tar files to batches: every form against transformers or a loop, over real ranks, with bad lines."""

import gzip
import json
from itertools import islice

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from moe_dist.checkpoint.train_state import merge_states
from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.cache.token_cache import build_cache, load_vocabulary, open_store
from moe_dist.data.shards.tars import Sample, write_shards
from moe_dist.data.stream.held_out_batches import held_out_batches
from moe_dist.data.stream.loader import make_loader
from moe_dist.parallel.layout import make_layout
from moe_dist.parallel.signals import StopSignals
from moe_dist.training.setup import open_data
from tests.data.tasks.test_instructions import values
from tests.data.tasks.test_records import ALPACA_PROMPT
from tests.support.chat_cases import CHATML, LLAMA3, conversation, save_chat_tokenizer, write_lines
from tests.support.distributed import run_ranks

TALK = conversation("hello", "there", "what is 1?", "2 3", system="a bear")
FORMS = [
    {"messages": TALK, "domain": "chat"},
    {"conversations": [{"from": "human", "value": "is it?"}, {"from": "gpt", "value": "it is"}]},
    {"instruction": "Name a fruit.", "input": "", "output": "Plum"},
    {"prompt": "the colour:", "answer": " red"},
    {"text": "a small red bear"},
]


@pytest.fixture(params=[CHATML, LLAMA3], ids=["chatml", "llama3"])
def folder(request, tmp_path):
    return save_chat_tokenizer(tmp_path / "tokenizer", request.param)


def recipe(tmp_path, *shards, **changes):
    raw = {"shards": [str(path) for path in shards], "text_tokenizer": str(tmp_path / "tokenizer")}
    raw |= {"sequence_length": 512, "lanes": 1, "group_sequences": 1, "validation_shards": str(shards[0])}
    return validate(DataConfig, raw | changes, "test", "data")


def store_of(data):
    vocabulary = load_vocabulary(data)
    build_cache(data, "train", vocabulary)
    return vocabulary, open_store(data, "train", vocabulary)


def expected_documents(folder):
    """Return the ids of each of FORMS with its markers, and the ids that are learned, by transformers' functions."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    made = []
    for messages in (TALK, conversation("is it?", "it is")):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        both = tokenizer.apply_chat_template(messages, **options)
        ids, mask = both["input_ids"], both["assistant_masks"]
        own = ids[0] == bos
        made.append(([bos] * (not own) + ids + [eos], [0] * (not own) + mask + [1]))
    for prompt, answer in ((ALPACA_PROMPT, " Plum"), ("the colour:", " red")):
        first, second = tokenizer.encode(prompt), tokenizer.encode(answer)
        made.append(([bos, *first, *second, eos], [0] * (1 + len(first)) + [1] * (len(second) + 1)))
    text = [bos, *tokenizer.encode(FORMS[4]["text"]), eos]
    return [*made, (text, [0] + [1] * (len(text) - 1))]


def pieces_of(batch):
    """Return each document of a batch as its ids and, for each of them, whether it is predicted."""
    at = 0
    for length in batch.info.document_lengths:
        ids, mask = batch.tokens_T[at : at + length].tolist(), batch.loss_mask_T[at : at + length].tolist()
        if bool(batch.info.valid_T[at]):
            assert not mask[-1] and batch.targets_T[at : at + length - 1].tolist() == ids[1:]
            yield tuple(ids), tuple([0, *map(int, mask[:-1])])
        at += length


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "tar"])
def test_every_form_reaches_the_batch(tmp_path, folder, kind):
    if kind == "tar":
        path = tmp_path / "tars"
        write_shards([Sample(f"{i}", s, None, None, r) for i, r in enumerate(FORMS) for s in ["train"]], path)
        path = path / "train" / "shard-000000.tar"
    else:
        path = write_lines(tmp_path / "a.jsonl", FORMS)
        if kind.endswith("gz"):
            content = path.read_bytes()
            path = path.with_suffix(".jsonl.gz")
            path.write_bytes(gzip.compress(content))
    data = recipe(tmp_path, path, lanes=1)
    vocabulary, store = store_of(data)
    assert (len(store), store.domains) == (5, ("chat", "instructions"))
    options = {"groups": 9, "dp_rank": 0, "dp": 1, "batch_groups": 1}
    found = [piece for batch in held_out_batches(store, vocabulary, data, **options) for piece in pieces_of(batch)]
    assert sorted(found) == sorted((tuple(ids), tuple(mask)) for ids, mask in expected_documents(folder))


def test_llavas_conversation_about_a_picture_in_a_tar(tmp_path, folder, tokenizers, emoji_samples):
    llava = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nis it?"}, *FORMS[1]["conversations"][1:]],
    }
    write_shards([Sample("a", "train", emoji_samples[0].png, None, llava)], tmp_path / "tars")
    data = recipe(tmp_path, tmp_path / "tars" / "train", image_tokenizer=str(tokenizers / "vq"))
    vocabulary, store = store_of(data)
    assert (len(store), store.domains, store.pairs) == (1, ("instructions",), 1)
    batch = next(make_loader(store, vocabulary, data, seed=0, dp_rank=0, dp=1, batch_groups=1)).batch
    ids, mask = next(pieces_of(batch))
    codes = ids[2 : ids.index(vocabulary.eoi)]
    expected, learned = expected_documents(folder)[1]
    assert ids == (vocabulary.bos, vocabulary.boi, *codes, vocabulary.eoi, *expected[1:])
    assert len(codes) == vocabulary.image.num_codes and mask == (*[0] * (2 + len(codes)), *learned)


@pytest.mark.parametrize("bos", [True, False])
def test_a_conversation_that_just_fits_is_kept(tmp_path, bos):
    save_chat_tokenizer(tmp_path / "tokenizer", bos=bos)
    path = write_lines(tmp_path / "a.jsonl", FORMS[:1] + FORMS[4:])
    _, store = store_of(recipe(tmp_path, path))
    whole = len(store.document(0).text) + bos + 1
    for length, kept in ((whole, 2), (whole - 1, 1)):
        data = recipe(tmp_path, path, sequence_length=length, max_bad_fraction=0.9)
        vocabulary, store = store_of(data)
        assert len(store) == kept
        for batch, *_ in islice(make_loader(store, vocabulary, data, seed=0, dp_rank=0, dp=1, batch_groups=1), 3):
            assert max(batch.info.document_lengths) <= length


def test_another_chat_template_makes_new_tokens(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", FORMS)
    digests, texts = [], []
    for template in (CHATML, LLAMA3, CHATML):
        save_chat_tokenizer(tmp_path / "tokenizer", template)
        _, store = store_of(recipe(tmp_path, path))
        digests.append(store.digest)
        texts.append(store.document(0).text.tolist())
    assert texts[0] == texts[2] != texts[1] and digests[0] == digests[2] != digests[1]


# ---------------------------------------------------------------------------------------------------------- on ranks


def files(tmp_path):
    save_chat_tokenizer(tmp_path / "tokenizer")
    talks = [{"messages": conversation(f"what is {i}?", f"it is {i}", "and?", "1 2 3")} for i in range(40)]
    prompts = [{"prompt": f"the colour {i}:", "answer": f" red {i}"} for i in range(24)]
    paths = [write_lines(tmp_path / "talks.jsonl", talks), write_lines(tmp_path / "prompts.jsonl", prompts)]
    return {"shards": [str(p) for p in paths], "weights": [1, 3], "validation_fraction": 0.2, "validation_shards": None}


def groups_of(train, vocabulary, data, count, *, dp_rank=0, dp=1, state=None):
    """Return a rank's first batches by global token id, and its loader state."""
    loader = make_loader(train, vocabulary, data, seed=1, dp_rank=dp_rank, dp=dp, batch_groups=1, state=state)
    items = list(islice(loader, count // dp))
    return {int(item.batch.info.token_id_T[0]): values(item.batch) for item in items}, items[-1].state


def read(rank, raw, count):
    """Return what groups_of returns on this rank, and the number of held-out documents."""
    data = validate(DataConfig, raw, "test", "data")
    layout = make_layout(expert=1, device=torch.device("cpu"))
    vocabulary = load_vocabulary(data)
    train, held_out = open_data(data, vocabulary, layout, StopSignals())
    return *groups_of(train, vocabulary, data, count, dp_rank=layout.dp_rank, dp=layout.dp), len(held_out)


def test_two_ranks_equal_one_and_resume_at_another_number(tmp_path):
    raw = recipe(tmp_path, "unused", sequence_length=96, lanes=4, group_sequences=1).model_dump() | files(tmp_path)
    (first, state_0, held_out), (second, state_1, same) = run_ranks(read, 2, raw, 6)
    assert held_out == same > 3, "a split of the prompts is held out"
    data = validate(DataConfig, raw, "test", "data")
    vocabulary, train = load_vocabulary(data), open_store(data, "train", load_vocabulary(data))
    one, last = groups_of(train, vocabulary, data, 12)
    state = json.loads(json.dumps(merge_states([state_0, state_1])))
    resumed, end = groups_of(train, vocabulary, data, 6, state=state)
    assert first | second | resumed == one and end == last


def fail(rank, raw):
    data = validate(DataConfig, raw, "test", "data")
    try:
        open_data(data, load_vocabulary(data), make_layout(expert=1, device=torch.device("cpu")), StopSignals())
    except UserError as error:
        return str(error).removesuffix(" (rank 0)").removesuffix(" (rank 1)")
    return None


@pytest.mark.parametrize(
    ("spoil", "sentence", "name"),
    [
        (
            lambda folder: (folder / "prompts.jsonl").open("a").write("{"),
            r"prompts.jsonl: line 25 is not valid JSON",
            "prompts",
        ),
        (lambda folder: save_chat_tokenizer(folder / "tokenizer", "{{ x.y }}"), "fails: UndefinedError", "talks"),
        (lambda folder: save_chat_tokenizer(folder / "tokenizer", None), "has no chat template", "talks"),
    ],
    ids=["broken line", "broken template", "no template"],
)
def test_bad_input_is_one_sentence_on_every_rank(tmp_path, spoil, sentence, name):
    raw = recipe(tmp_path, "unused", lanes=4).model_dump() | files(tmp_path)
    spoil(tmp_path)
    told = run_ranks(fail, 2, raw)
    assert told[0] == told[1] and sentence in told[0] and "\n" not in told[0]
    assert not list(tmp_path.glob(f"tokens/*/{name}*")), "nothing is written of this file"
