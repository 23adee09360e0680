"""Names and texts in every encoding: each sample is read or counted with its reason, and nothing raises."""

import io
import json
import random
import tarfile

import pytest

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.cache.token_cache import build_cache, load_vocabulary, open_store
from moe_dist.data.shards.sample_report import SampleReport
from moe_dist.data.shards.shard_index import verify_shard
from moe_dist.data.shards.tars import SPLITS, Shard, iterate, resolve_shards, split_of
from moe_dist.data.tokenizers.tokenizer_training import TokenizerRecipe, train_tokenizers
from tests.support.launching import ALONE, launch

SURROGATE = "text with a lone surrogate"
BOM = b"\xef\xbb\xbf"


def write_tar(path, members, encoding="utf-8"):
    """Write (name, content) members as GNU tar does where this is the encoding of file names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding=encoding) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read(tar):
    report = SampleReport()
    return {sample.key: sample for sample in iterate(str(tar), report)}, report


@pytest.mark.parametrize("field", ["caption", "text"])
def test_a_caption_with_a_lone_surrogate_is_one_bad_sample(tmp_path, field):
    members = [
        ("a.json", json.dumps({field: "half \ud83d"}).encode()),
        ("b.json", b'{"caption": "whole \\ud83d\\ude00"}'),
    ]
    samples, report = read(write_tar(tmp_path / "a.tar", members))
    assert {key: sample.caption for key, sample in samples.items()} == {"b": "whole \U0001f600"}
    assert report.summary() == f"1 of 2 samples skipped: 1 {SURROGATE} (a)"


@pytest.mark.parametrize("key", ["prompt", "answer", "domain", "question", "options"])
def test_an_instruction_with_a_lone_surrogate_is_one_bad_sample(tmp_path, key):
    good = {"prompt": "?", "answer": " A", "domain": "d", "question": "?", "options": ["a", "b"], "correct": 0}
    bad = good | {key: ["a", "\ud83d"] if key == "options" else "\ud83d"}
    members = [("good.json", json.dumps(good | {"other": "\ud83d"}).encode()), ("bad.json", json.dumps(bad).encode())]
    samples, report = read(write_tar(tmp_path / "a.tar", members))
    assert list(samples) == ["good"] and report.summary() == f"1 of 2 samples skipped: 1 {SURROGATE} (bad)"


def test_json_that_is_nested_too_deeply_is_one_bad_sample(tmp_path):
    _, report = read(write_tar(tmp_path / "a.tar", [("a.json", b"[" * 200_000)]))
    assert report.summary() == "1 of 1 samples skipped: 1 undecodable caption (a)"


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    members = [
        ("a.txt", BOM + b"a bear\r\n"),
        ("b.json", BOM + b'{"caption": "a boat"}'),
        ("c.json", '{"caption": "\ufeffa tree"}'.encode()),
        ("d.txt", BOM),
    ]
    samples, report = read(write_tar(tmp_path / "a.tar", members))
    assert {key: sample.caption for key, sample in samples.items()} == {"a": "a bear", "b": "a boat", "c": "a tree"}
    assert report.summary() == "1 of 4 samples skipped: 1 neither image nor caption (d)"


def test_latin_1_names_are_split_by_their_bytes(tmp_path):
    """Every sample is in one split, and a key that cannot be printed is shown with escaped bytes."""
    names = [f"caf\u00e9 {i}" for i in range(200)]
    tar = write_tar(tmp_path / "own" / "a.tar", [(f"{name}.txt", b"text") for name in names], "latin-1")
    assert verify_shard(tar).count == 200
    keys = {
        split: [s.key for shard in resolve_shards(str(tar.parent), split) for s in iterate(shard)] for split in SPLITS
    }
    expected = {
        split: [n.replace("\u00e9", r"\xe9") for n in names if split_of(n.replace("\u00e9", "\udce9")) == split]
        for split in SPLITS
    }
    assert keys == expected and len(keys["train"]) > 30 and all(keys.values())
    bad = write_tar(tmp_path / "b.tar", [("\u00fc.txt", b"\xff")], "latin-1")
    assert read(bad)[1].summary() == r"1 of 1 samples skipped: 1 undecodable caption (\xfc)"


def test_names_are_the_same_at_every_locale(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", [("\u00fc.txt", b"text")])
    monkeypatch.setattr(tarfile.TarFile, "encoding", "latin-1")
    assert list(read(tar)[0]) == ["\u00fc"]


def test_a_shard_whose_own_name_is_not_utf_8(tmp_path):
    tar = write_tar(tmp_path / "caf\udce9.tar", [("a.txt", b"text")])
    assert verify_shard(tar) == verify_shard(tar) and len(read(tar)[0]) == 1


def test_the_training_of_a_tokenizer_names_the_sample(tmp_path, capsys):
    members = [(f"{i}.txt", b"a line of text about bears") for i in range(400)]
    members += [("bad.json", b'{"caption": "\\ud83d"}'), ("lost.psd", b"8BPS"), ("lost.txt", b"a bear")]
    write_tar(tmp_path / "train" / "a.tar", members)
    write_tar(tmp_path / "validation" / "a.tar", members[:1])
    raw = {"shards": str(tmp_path), "out": str(tmp_path / "out"), "vocab_size": 290}
    assert train_tokenizers(validate(TokenizerRecipe, raw, "test"))[0].size > 256
    assert (
        f"warning: train: 1 of 402 samples skipped: 1 {SURROGATE} (bad); 1 of 402 lost a part: 1 image"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match=rf"1 {SURROGATE} \(bad\); .*; data.max_bad_fraction=0.0 allows fewer"):
        train_tokenizers(validate(TokenizerRecipe, raw | {"max_bad_fraction": 0.0}, "test"))


@pytest.mark.slow
def test_a_run_on_such_texts_asks_for_no_restart(tokenizers, tmp_path):
    members = [(f"caf\u00e9 {i}.json", b'{"caption": "\\ud83d"}') for i in range(40)]
    write_tar(tmp_path / "own" / "a.tar", members, "latin-1")
    data = [
        "parallel.expert=1",
        f"data.shards={tmp_path}/own",
        f"data.text_tokenizer={tokenizers}/text.model",
        "data.image_tokenizer=null",
    ]
    done = launch(ALONE, [f"run.dir={tmp_path}/run", *data], config="configs/adamoe_quickstart.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr and SURROGATE in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["restart"]) == ("failed", False) and r"(caf\xe9 0" in status["reason"]


# ------------------------------------------------------------------------------------------------------ property


def draw_member(draw, number):
    """Return a random member, and what is expected: its caption, or the reason why it is bad."""
    words = draw.choice(["a bear", "caf\u00e9", "\u4e16\u754c", "two\nlines", "\U0001f600"])
    name = draw.choice(["plain", "caf\u00e9", "n\u00fc\u00df"]) + str(number)
    kind = draw.choice(["txt", "bom", "latin", "json", "json bom", "escaped", "surrogate", "raw surrogate", "empty"])
    quoted = json.dumps({"caption": words}, ensure_ascii=kind == "escaped").encode()
    latin = words.encode("latin-1", errors="replace")
    content, expected = {
        "txt": (words.encode(), words),
        "bom": (BOM + words.encode(), words),
        "latin": (latin + b"\xe9", "undecodable caption"),
        "json": (quoted, words),
        "json bom": (BOM + quoted, words),
        "escaped": (quoted, words),
        "surrogate": (b'{"caption": "a \\udc80"}', SURROGATE),
        "raw surrogate": (b'{"caption": "a \xed\xa0\x80"}', SURROGATE),
        "empty": (BOM, "neither image nor caption"),
    }[kind]
    suffix = "txt" if kind in ("txt", "bom", "latin", "empty") else "json"
    return f"{name}.{suffix}", content, expected


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_is_used_or_counted(tokenizers, tmp_path, seed):
    draw = random.Random(seed)
    drawn = [draw_member(draw, number) for number in range(30)]
    tar = write_tar(
        tmp_path / "a.tar", [(name, content) for name, content, _ in drawn], draw.choice(["utf-8", "latin-1"])
    )
    samples, report = read(tar)
    bad = [e for _, _, e in drawn if e in (SURROGATE, "undecodable caption", "neither image nor caption")]
    assert [sample.caption for sample in samples.values()] == [e for _, _, e in drawn if e not in bad]
    assert report.bad.total() == len(bad) and report.total == 30 and dict(report.bad) == {e: bad.count(e) for e in bad}
    split = [s.key for name in SPLITS for s in iterate(Shard(str(tar), name))]
    assert sorted(split) == sorted(samples), "each sample is in one split"
    report.summary().encode()
    settings = {"shards": str(tar), "validation_shards": "unused", "max_bad_fraction": 1.0}
    data = validate(DataConfig, settings | {"text_tokenizer": f"{tokenizers}/text.model"}, "test", "data")
    vocabulary = load_vocabulary(data)
    build_cache(data, "train", vocabulary)
    store = open_store(data, "train", vocabulary)
    texts = [vocabulary.text.decode(store.document(i).text) for i in range(len(store))]
    assert texts == [e for _, _, e in drawn if e not in bad] and store.report == report
