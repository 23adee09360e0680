"""Faults that the fuzz has found, one test each: the smallest input, and the sentence that it gets now."""

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from moe_dist.config.recipe import DataConfig, load_config
from moe_dist.core.errors import MOST_SHOWN, UserError
from moe_dist.core.strict import MOST_VALUES, validate
from moe_dist.data.cache.token_cache import build_cache, open_store
from moe_dist.data.shards.shard_index import verify_shard
from moe_dist.data.shards.tars import iterate
from moe_dist.data.tokenizers.hugging_face_text import HuggingFaceTokenizer
from moe_dist.data.tokenizers.image_tokenizer import load_image_tokenizer
from moe_dist.data.tokenizers.text_tokenizer import SentencePieceTokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from tests.support.fuzz_tars import Member, picture, write_members
from tests.support.launching import MOMA

# ---------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: \x00", "not valid YAML: unacceptable character #x0000"),
        ("? [a, b]\n: 1", r"the key of several values is not a text; write it in quotes \(line 1\)"),
        ("true: 1\nTrue: 2", r"the key 'true' is not a text; write it in quotes \(line 1\)"),
        ("model: {+1: 2, '1': 2}", r"key 'model': key '1' is given twice \(line 1\)"),
        ("data:\n  lanes: 1\n  lanes: 2", r"key 'data': key 'lanes' is given twice \(line 3\)"),
        ('run: {dir: "\\ud83d"}', r"key 'run\.dir': \\ud83d has a lone surrogate"),
        ("'': 1", "unknown key ''"),
        ("model: {'': 1}", r"unknown key 'model\.'"),
        ('"a\\nb": 1', r"unknown key 'a\\nb'"),
        ("data: {shards: ''}", r"key 'data\.shards': a path is not empty and has no null character"),
        ('data: {shards: "\\0"}', r"key 'data\.shards': a path is not empty and has no null character"),
    ],
)
def test_a_recipe_gives_one_sentence_that_names_the_file_and_the_key(tmp_path, text, sentence):
    recipe = tmp_path / "a.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=rf"a\.yaml: (.*; )?{sentence}") as caught:
        load_config(recipe)
    assert "\n" not in str(caught.value)


def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"more than {MOST_VALUES} values"):
        load_config(tmp_path / "a.yaml")


def test_a_long_value_is_cut_in_the_sentence():
    with pytest.raises(UserError, match=r"key 'model\.recompute': .*got 'xxx") as caught:
        load_config(MOMA, [f"model.recompute={'x' * 5000}"])
    assert MOST_SHOWN < len(str(caught.value)) < 3 * MOST_SHOWN


def test_a_name_that_is_too_long_for_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text(f"extends: {'x' * 3000}")
    with pytest.raises(UserError, match=r"a\.yaml: key 'extends': \[Errno 36\] File name too long: '"):
        load_config(tmp_path / "a.yaml")


def test_layers_without_number_are_no_list_of_layers():
    with pytest.raises(UserError, match=r"'0-99999999999' is not a list of layer numbers"):
        load_config(MOMA, ["model.layers={0-99999999999: {}}"])


@pytest.mark.parametrize(
    "key",
    [
        *("model.num_layers", "model.hidden_size", "model.ffn.hidden_size", "model.ffn.router.text.num_experts"),
        *("data.lanes", "train.steps", "eval.groups"),
    ],
)
def test_a_number_that_would_take_hours_or_all_memory_is_refused(key):
    with pytest.raises(UserError, match=f"key '{key}': input should be less than or equal to"):
        load_config(MOMA, [f"{key}={10**10}"])


# ------------------------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize("at", [-5, -1])
def test_a_compressed_tar_whose_checksum_or_size_differs(tmp_path, at):
    write_members(tmp_path / "a.tar", [Member("0.txt", b"a rose")])
    content = bytearray(gzip.compress((tmp_path / "a.tar").read_bytes()))
    content[at] ^= 1
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read shard .*a\.tar\.gz"):
        list(iterate(str(tmp_path / "a.tar.gz")))
    with pytest.raises(UserError, match=r"a\.tar\.gz is corrupt or truncated"):
        verify_shard(tmp_path / "a.tar.gz")


# ------------------------------------------------------------------------------------------------------- tokenizers


def test_an_empty_file_is_no_sentencepiece_model(tmp_path):
    (tmp_path / "text.model").touch()
    with pytest.raises(UserError, match=r"text\.model is not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "text.model")


@pytest.mark.parametrize("token", [5, ["<s>"], {"text": "<s>"}, {"content": 5}])
def test_a_special_token_that_is_no_text(sound, tmp_path, token):
    (tmp_path / "tokenizer.json").write_bytes((sound.path("hugging_face") / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": token}))
    with pytest.raises(UserError, match=r"names the special token .*, which is neither a text nor has a 'content'"):
        HuggingFaceTokenizer(tmp_path)


def edited(sound, folder, **changes):
    """Write the sound tokenizer with changes of its model, and return its folder."""
    tokenizer = json.loads((sound.path("hugging_face") / "tokenizer.json").read_text())
    tokenizer["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_ids_with_gaps_are_within_the_vocabulary(sound, tmp_path):
    tokenizer = json.loads((sound.path("hugging_face") / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    ours = HuggingFaceTokenizer(edited(sound, tmp_path, vocab=vocabulary | {"a": 900}))
    assert ours.encode("a") == [900] and ours.size == 901
    with pytest.raises(UserError, match=r"has the id 4000000000, but ids must be below"):
        HuggingFaceTokenizer(edited(sound, tmp_path, vocab=vocabulary | {"a": 4_000_000_000}))


def test_a_text_gets_the_same_ids_again_whatever_the_folder_says_of_dropout(sound, tmp_path):
    ours = HuggingFaceTokenizer(edited(sound, tmp_path, dropout=0.5))
    assert len({tuple(ours.encode("a small red rose")) for _ in range(20)}) == 1


def test_an_error_inside_the_tokenizers_library_is_one_sentence(tmp_path):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="nowhere")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json cannot encode 'rose': WordLevel error"):
        HuggingFaceTokenizer(tmp_path).encode("rose")


def test_a_text_of_which_the_tokenizer_makes_nothing_is_counted(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_members(tmp_path / "a.tar", [Member("0.txt", b"a a"), Member("1.txt", b"rose"), Member("2.txt", b"a rose")])
    settings = {"shards": f"{tmp_path}/a.tar", "validation_shards": "unused", "text_tokenizer": "unused"}
    data = validate(DataConfig, settings | {"max_bad_fraction": 1.0}, "test")
    vocabulary = Vocabulary(HuggingFaceTokenizer(tmp_path))
    build_cache(data, "train", vocabulary)
    store = open_store(data, "train", vocabulary)
    assert len(store) == 2 and store.report.summary() == "1 of 3 samples skipped: 1 the tokenizer drops the text (1)"


@pytest.mark.parametrize("length", [512, 16])
def test_a_sample_is_not_counted_as_both_lost_and_bad(sound, tmp_path, length):
    merging = json.dumps({"prompt": "a small re", "answer": "d rose", "domain": "d"}).encode()
    long = json.dumps({"prompt": "a small red rose" * 3, "answer": " b", "domain": "d"}).encode()
    members = [Member("0.png", picture(0, "PNG")), Member("0.json", merging if length == 512 else long)]
    members.append(Member("0.v2.jpg", picture(1, "JPEG")))
    write_members(tmp_path / "a.tar", members)
    settings = {"shards": f"{tmp_path}/a.tar", "validation_shards": "unused", "text_tokenizer": "unused"}
    data = validate(DataConfig, settings | {"max_bad_fraction": 1.0, "sequence_length": length}, "test")
    vocabulary = sound.vocabulary
    build_cache(data, "train", vocabulary)
    store = open_store(data, "train", vocabulary)
    assert len(store) == 0 and store.report.lost.total() == 1 and not store.report.bad and store.report.used == 0


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("vq", {"image_size": 1 << 40}, "key 'image_size': input should be less than or equal to 4096"),
        ("vq", {"blocks": 10**9}, "key 'blocks': input should be less than or equal to"),
        ("vq", {"codebook_size": 1 << 17, "code_width": 1 << 17}, "has the shape"),
        ("chameleon", {"resolution": -(2**64)}, "resolution=-18446744073709551616 is not between 1 and"),
        ("chameleon", {"resolution": 17}, "resolution=17 is above 4096 or not divisible 1 times by 2"),
        ("chameleon", {"num_res_blocks": 10**9}, "num_res_blocks=1000000000 times 2 levels is not between"),
        ("chameleon", {"base_channels": 1 << 17, "num_embeddings": 1 << 17}, "has the shape"),
    ],
)
def test_sizes_of_an_image_tokenizer_that_would_take_all_memory(sound, tmp_path, name, changes, sentence):
    config = json.loads((sound.path(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "model.safetensors").write_bytes((sound.path(name) / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=sentence):
        load_image_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "change", "sentence"),
    [
        ("encoder.0.weight", lambda x: x * float("nan"), "'encoder.0.weight' has values that are not finite"),
        ("encoder.0.weight", lambda x: x.long(), "'encoder.0.weight' has the type torch.int64, not torch.float32"),
        ("quantizer._codebook.initted", torch.zeros_like, "is not trained: its codebook is empty"),
    ],
)
def test_weights_that_would_give_other_codes(sound, tmp_path, tensor, change, sentence):
    tensors = load_file(sound.path("vq") / "model.safetensors")
    save_file(tensors | {tensor: change(tensors[tensor])}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sound.path("vq") / "config.json").read_bytes())
    with pytest.raises(UserError, match=sentence):
        load_image_tokenizer(tmp_path)
