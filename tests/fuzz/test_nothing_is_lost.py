"""Random corpora of which every byte, token and sample is used, unused by design, or lost and counted.

Kind of loss (issue "Nothing is lost in silence") -> its property test:
1 parts of a sample: here, and tests/data/shards/test_lost_parts.py; 2 structure of a tar: here, and the tars of
test_fuzz.py; 3 continuations: tests/data/tasks/test_continuation.py; 4 encodings: tests/data/shards/test_encodings.py;
5 environment: here (paths); 6 waiting: tests/parallel/test_meeting.py, a table of signals and ranks; 8 small: here
(numbers), and the recipes of test_fuzz.py.
"""

import gzip
import json
import re
import shlex
import subprocess
from random import Random

import pytest

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.paths import expand
from moe_dist.core.strict import parse_yaml, validate
from moe_dist.data.cache.token_cache import build_cache, open_store
from moe_dist.data.shards.sample_report import SampleReport
from moe_dist.data.shards.samples import decode_image
from moe_dist.data.shards.tars import iterate
from moe_dist.data.stream.held_out_batches import held_out_batches
from tests.support.fuzz_tars import Member, key_of, pack, picture, write_members

LOSABLE = (
    "psd",
    "v2.jpg",
    "v2.txt",
    "caption",
    "img",
    "txt.gz",
)  # endings of parts that are lost unless another is used


# ------------------------------------------------------------------------------------------ bytes of texts and pictures


def draw_sample(draw, number):
    """Draw the members of a sample: ending -> content. No two contents of a tar are alike."""
    text = f"text {number} caf\u00e9"
    contents = {
        "png": picture(4 * number, "PNG"),
        "gif": picture(4 * number + 1, "GIF"),
        "txt": draw.choice([text, f"\ufeff{text}\n", " ", "\udcff"]).encode(errors="surrogateescape"),
        "json": draw.choice(
            [json.dumps({"caption": f"json {number}", "id": number}), '{"id": 1}', "{", "[1]"]
        ).encode(),
        "psd": b"8BPS",
        "img": picture(4 * number + 3, "PNG"),
        "txt.gz": gzip.compress(text.encode()),
        "v2.jpg": picture(4 * number + 2, "JPEG"),
        "v2.txt": b"dotted",
        "caption": b"not read",
        "cls": b"7",
    }
    return {ending: contents[ending] for ending in draw.sample(sorted(contents), draw.randint(1, 5))}


def unaccounted(sample, files):
    """Return the endings of members whose content is not in the sample and that it does not name as unused."""
    fields = {name.removeprefix("json field ") for name in sample.unused if name.startswith("json field ")}
    left = []
    for ending, content in files.items():
        shown = ending in ("png", "gif") and sample.image is not None
        used = shown and decode_image(content).tobytes() == sample.image.tobytes()
        used |= bool(sample.caption) and sample.caption.encode() in content
        if ending == "json" and not used:
            used = bool(fields) and fields == set(json.loads(content))
        if not used and f".{ending}" not in sample.unused and content.strip():
            left.append(ending)
    return left


@pytest.mark.parametrize("seed", range(20))
def test_bytes_used_unused_and_lost_are_the_bytes_written(tmp_path, seed):
    draw = Random(seed)
    written = {f"{number:03d}": draw_sample(draw, number) for number in range(30)}
    members = [Member(f"{key}.{end}", content) for key, files in written.items() for end, content in files.items()]
    write_members(tmp_path / "a.tar", members)
    report = SampleReport()
    read = {sample.key: sample for sample in iterate(str(tmp_path / "a.tar"), report)}
    for key, files in written.items():
        if key not in read:
            continue  # the whole sample is bad or lost
        left = unaccounted(read[key], files)
        if read[key].loss is None:
            assert not left, f"{files} became {read[key]}"
        else:
            assert set(left) <= {*LOSABLE, "json"}, f"{files} became {read[key]}"
    skipped = len(written) - len(read)
    assert report.bad.total() <= skipped <= report.bad.total() + report.lost.total()
    assert report.used == sum(sample.loss is None for sample in read.values()) > 0


# --------------------------------------------------------------------------------------------------- tokens of captions


@pytest.mark.parametrize("seed", range(6))
def test_tokens_that_reach_the_model_and_tokens_cut_are_the_tokens_written(sound, tmp_path, seed):
    draw = Random(seed)
    members = []
    for number in range(40):
        text = " ".join(["rose"] * draw.choice((1, 3, 20, 60))).encode()
        pair = [Member(f"{number}.png", picture(number, "PNG"))] if draw.random() < 0.6 else []
        members += [*pair, Member(f"{number}.txt", text)]
    write_members(tmp_path / "a.tar", members)
    settings = {"shards": f"{tmp_path}/a.tar", "validation_shards": f"{tmp_path}/a.tar", "text_tokenizer": "unused"}
    settings |= {"image_tokenizer": "unused", "max_bad_fraction": 1.0, "sequence_length": draw.choice((16, 32, 77))}
    data = validate(DataConfig, settings, "test")
    vocabulary = sound.vocabulary
    build_cache(data, "train", vocabulary)
    store = open_store(data, "train", vocabulary)
    written = sum(
        len(vocabulary.text.encode(member.content.decode())) for member in members if member.name[-3:] == "txt"
    )
    cut = [re.fullmatch(r"caption cut: (\d+) of (\d+) tokens", reason) for reason in store.report.lost]
    lost = sum(int(found[1]) for found in cut if found)
    markers = {vocabulary.pad, vocabulary.bos, vocabulary.eos, vocabulary.boi, vocabulary.eoi}
    batches = held_out_batches(store, vocabulary, data, groups=10**6, dp_rank=0, dp=1, batch_groups=1)
    ids = [i for batch in batches for i in batch.tokens_T.tolist() if i not in markers]
    text = sum(i < vocabulary.text.size for i in ids)
    assert text + lost == written and len(ids) - text == vocabulary.image.num_codes * store.has_image.sum()
    assert lost > 0


# --------------------------------------------------------------------------------------------------- structure of a tar


@pytest.mark.parametrize("seed", range(20))
def test_tars_in_any_order_and_joined_in_any_way_are_read_whole_or_refused(tmp_path, seed):
    draw = Random(seed)
    groups = [[Member(f"{n}.{end}", b"t") for end in draw.sample(("txt", "cls", "id"), 2)] for n in range(8)]
    if draw.random() < 0.5:  # the members of two samples mix
        one, other = draw.sample(range(8), 2)
        groups[one][0], groups[other][0] = groups[other][0], groups[one][0]
    cuts = sorted(draw.choices(range(9), k=draw.choice((0, 0, 1, 2))))
    parts = [groups[a:b] for a, b in zip([0, *cuts], [*cuts, 8], strict=True)]
    packed = [pack(draw, [member for group in part for member in group]) for part in parts]
    (tmp_path / "a.tar").write_bytes(b"".join(packed))
    report = SampleReport()
    keys = [key_of(member.name) for group in groups for member in group]
    apart = any(key in keys[:i] and keys[i - 1] != key for i, key in enumerate(keys))
    hidden = any(part for part in parts[1:])
    if apart or hidden:
        with pytest.raises(UserError, match=r"comes back after other samples|bytes follow its end-of-archive marker"):
            list(iterate(str(tmp_path / "a.tar"), report))
    else:
        assert len(list(iterate(str(tmp_path / "a.tar"), report))) + report.bad.total() == report.total == 8


# --------------------------------------------------------------------------------------------------- paths and numbers


def test_paths_are_expanded_as_a_shell_does(monkeypatch):
    monkeypatch.setenv("FUZZ_A", "/scratch/a b")
    monkeypatch.setenv("FUZZ", "x")
    draw = Random(0)
    parts = (
        "~",
        "~/",
        "~root",
        "$FUZZ",
        "${FUZZ}",
        "$FUZZ_A",
        "/",
        ".",
        "a",
        "caf\u00e9",
        "-",
        "${FUZZ_A}",
        "=",
        "{0..3}",
    )
    paths = {"".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(300)}
    other_users = re.compile(r"~[^/]*[$~{=.\-a\u00e9]|~root[^/]")  # or names that no user or variable has
    paths = [path for path in sorted(paths) if not other_users.match(path) and not re.search(r"\$FUZZ(_A)?a", path)]
    quoted = "\n".join(f"printf '%s\\n' {_for_shell(path)}" for path in paths)
    told = subprocess.run(["bash", "-c", quoted], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [expand(path) for path in paths] == told and len(paths) > 100


def _for_shell(path):
    """Quote a path except for a leading `~` and variables."""
    tilde = re.match(r"~[a-z]*(/|$)", path)
    head = tilde[0] if tilde else ""
    return head + "".join(
        f'"{part}"' if part.startswith("$") else shlex.quote(part)
        for part in re.split(r"(\$\w+|\$\{\w+\})", path[len(head) :])
        if part
    )


def test_a_number_is_decimal_or_refused():
    draw = Random(0)
    kinds = set()
    for _ in range(1000):
        text = "".join(draw.choices("0123456789_:xob.e+-", k=draw.randint(1, 5)))
        try:
            value = parse_yaml(f"a: {text}", "here")
        except UserError:
            kinds.add("refused")
            continue
        number = value["a"] if isinstance(value, dict) else None
        kinds.add(type(number))
        if isinstance(number, int | float):
            assert number == float(text) and set(text) <= set("0123456789.e+-"), text
    assert kinds >= {"refused", int, float, str}
