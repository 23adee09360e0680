"""JSONL shards: every line is read as Python's json reads it, broken lines are named, splits go by prompt."""

import gzip
import json

import pytest

from moe_dist.core.errors import UserError
from moe_dist.data.shards.sample_report import SampleReport
from moe_dist.data.shards.shard_index import verify_shard
from moe_dist.data.shards.tars import SPLITS, Sample, Shard, iterate, resolve_shards, verify_shards, write_shards
from tests.support.chat_cases import conversation, write_lines

RECORDS = [{"prompt": f"Ünï {i}:", "answer": f" {i} ½"} for i in range(5)] + [{"text": "plain  text"}]
LINES = [json.dumps(record, ensure_ascii=number % 2 == 0).encode() for number, record in enumerate(RECORDS)]


def packed(content, members):
    size = -(-len(content) // members)
    return b"".join(gzip.compress(content[i * size : (i + 1) * size]) for i in range(members))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\n".join(LINES)),
        ("a.jsonl", b"\n".join(LINES) + b"\n\n"),
        ("a.jsonl", b"\xef\xbb\xbf" + b"\r\n".join(LINES)),
        ("a.jsonl.gz", packed(b"\n".join(LINES), 1)),
        ("a.jsonl.gz", packed(b"\n".join(LINES), 3)),
        ("a.jsonl.gz", b"\n".join(LINES)),
        ("a.jsonl", packed(b"\n".join(LINES), 1)),
    ],
)
def test_every_line_is_a_sample(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for url in (str(tmp_path / name), f"file:{tmp_path / name}", f"pipe:cat {tmp_path / name}"):
        samples = list(iterate(url))
        assert [s.texts for s in samples] == [
            (r.get("text", r.get("prompt", "") + r.get("answer", "")),) for r in RECORDS
        ]
        assert [s.key for s in samples] == [f"{name} line {i + 1}" for i in range(6)]
    index = verify_shard(tmp_path / name)
    assert index == verify_shard(tmp_path / name) and (index.count, index.bytes) == (6, len(content))
    (tmp_path / name).write_bytes(content.replace(content[-1:], b"x"))
    with pytest.raises(UserError, match=f"{name} is corrupt or was replaced"):
        verify_shard(tmp_path / name)


def test_lines_are_numbered_with_the_empty_ones(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + LINES[0] + b"\n  \n" + LINES[1])
    assert [sample.key for sample in iterate(str(tmp_path / "a.jsonl"))] == ["a.jsonl line 2", "a.jsonl line 4"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "ans', r"line 3 is not valid JSON \(Unterminated string starting at at character 17\)"),
        (b"[1, 2]", "line 3 is no JSON object"),
        (b"3", "line 3 is no JSON object"),
        (b'{"prompt": "\xff"}', "line 3 is not UTF-8"),
        (b"[" * 100_000, "line 3 is not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "line 3 is not valid JSON"),
    ],
)
def test_a_broken_line_is_named_and_no_index_is_written(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*LINES[:2], line, LINES[3]]))
    for read in (lambda: verify_shards([Shard(str(path))]), lambda: list(iterate(f"pipe:cat {path}"))):
        with pytest.raises(UserError, match=rf"^shard .*a\.jsonl: {reason}.*; mend the line or leave it out$") as error:
            read()
        assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-9], "ended before"),
        (lambda content: content[:-4], "ended before"),
        (lambda content: content.replace(b"plain", b"other"), "CRC check failed"),
    ],
)
def test_damaged_compression_is_named(tmp_path, damage, reason):
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(b"\n".join(LINES), 0)))
    with pytest.raises(UserError, match=rf"a\.jsonl\.gz is corrupt or truncated: .*{reason}"):
        verify_shard(tmp_path / "a.jsonl.gz")
    with pytest.raises(UserError, match=rf"cannot read shard .*a\.jsonl\.gz: .*{reason}"):
        list(iterate(str(tmp_path / "a.jsonl.gz")))


def test_a_json_array_is_refused_with_advice(tmp_path):
    (tmp_path / "alpaca.json").write_text("[]")
    with pytest.raises(UserError, match=r"alpaca\.json is no shard: write each record on a line of its own, `jq -c"):
        resolve_shards(str(tmp_path / "alpaca.json"))


def test_bad_and_lost_samples_are_counted_with_their_lines(tmp_path):
    picture = {"image": "a.jpg", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    records = [RECORDS[0], {"foo": 1}, {"messages": conversation("only a question")}, picture, {"text": "\ud83d"}]
    report = SampleReport()
    assert len(list(iterate(str(write_lines(tmp_path / "a.jsonl", records)), report))) == 1
    assert dict(report.bad) == {
        "json has no caption, its keys are foo": 1,
        "conversation without an answer": 1,
        "text with a lone surrogate": 1,
    }
    assert dict(report.lost) == {"image that the record names is no member of the sample": 1}
    assert report.first_keys["conversation without an answer"] == ["a.jsonl line 3"]


def test_a_folder_of_jsonl_files(tmp_path):
    for name in ("train/b.jsonl", "train/a.jsonl.gz", "validation/c.jsonl"):
        write_lines(tmp_path / name, RECORDS)
    assert [shard.url for shard in resolve_shards(str(tmp_path))] == [
        str(tmp_path / name) for name in ("train/a.jsonl.gz", "train/b.jsonl")
    ]
    assert resolve_shards(str(tmp_path), "validation") == [Shard(str(tmp_path / "validation" / "c.jsonl"))]
    write_shards([Sample("a", "train", None, "text")], tmp_path / "tars")
    write_lines(tmp_path / "tars" / "train" / "log.jsonl", [{}])
    assert [shard.url[-4:] for shard in resolve_shards(str(tmp_path / "tars"))] == [".tar"], "tars come before JSONL"


def prompts_of(spec, split, fraction):
    shards = resolve_shards(spec, split, None, fraction)
    return [s.instruction.prompt if s.instruction else s.caption for shard in shards for s in iterate(shard)]


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_a_prompt_is_in_one_split_whatever_its_form_and_file(tmp_path, fraction):
    asked = [f"question {i}" for i in range(400)]
    forms = [[{"messages": conversation(q, f"{k}", "and?", "so")} for q in asked for k in range(2)]]
    forms += [[{"prompt": q, "answer": "a"} for q in reversed(asked)], [{"text": q} for q in asked]]
    spec = [str(write_lines(tmp_path / f"{i}.jsonl", records)) for i, records in enumerate(forms)]
    talks = [Sample(f"k{i}", "train", None, None, {"messages": conversation(q, "a")}) for i, q in enumerate(asked)]
    write_shards(talks, tmp_path / "tars")
    spec.append(str(tmp_path / "tars"))
    found = {split: prompts_of(spec, split, fraction) for split in SPLITS}
    assert sum(map(len, found.values())) == 5 * 400, "no sample is in two splits or in none"
    for split, prompts in found.items():
        assert all(prompts.count(prompt) == 5 for prompt in set(prompts)), split
    assert len(set(found["validation"])) / 400 == pytest.approx(fraction, abs=0.05)
    assert len(set(found["test"])) / 400 == pytest.approx(0.05, abs=0.03)
