"""Images and captions that an ending does not show, and names that other programs write or spell otherwise."""

import bz2
import gzip
import json
import lzma
import tarfile

import pytest

from moe_dist.core.errors import UserError
from moe_dist.data.shards.sample_groups import NO_KEY
from moe_dist.data.shards.sample_report import SampleReport
from moe_dist.data.shards.shard_index import verify_shard
from moe_dist.data.shards.tars import iterate, unread_shards
from tests.support.fuzz_tars import Member, picture, write_members
from tests.support.permissions import public_folder, unprivileged

PNG = picture(0, "PNG")
UTF_16 = "a rose".encode("utf-16-le")


def read(path, *members):
    """Write members (name, content), and return key -> (has a picture, caption) of the samples read, and the report."""
    write_members(path, [Member(name, content) for name, content in members])
    report = SampleReport()
    return {s.key: (s.image is not None, s.caption) for s in iterate(str(path), report)}, report


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("ending", ["img", "pfm", "0001", "jpg_", "png "])
def test_an_image_with_any_ending_is_lost_and_named(tmp_path, kind, ending):
    samples, report = read(tmp_path / "a.tar", (f"a.{ending}", picture(1, kind)), ("a.txt", b"t"), ("b.txt", b"t"))
    assert samples == {"a": (False, "t"), "b": (False, "t")}
    assert dict(report.lost) == {f"image member .{ending} is not supported": 1} and report.used == 1


@pytest.mark.parametrize(
    ("members", "used", "lost"),
    [
        ({"jpg.gz": b"x", "txt": b"t"}, (False, "t"), "image member .jpg.gz is compressed"),
        ({"png": PNG, "txt.gz": b"x"}, (True, None), "caption member .txt.gz is compressed"),
        ({"png": PNG, "json.zst": b"x"}, (True, None), "caption member .json.zst is compressed"),
        ({"png": PNG, "txt": b"t", "json.gz": b"x", "jpg.xz": b"x"}, (True, "t"), None),
        ({"png": PNG, "txt": b"t", "img": PNG, "tar.gz": b"x"}, (True, "t"), None),
        ({"PNG": PNG, "Txt": b"t"}, (True, "t"), None),
    ],
)
def test_compressed_members_and_further_images(tmp_path, members, used, lost):
    samples, report = read(tmp_path / "a.tar", *[(f"a.{end}", content) for end, content in members.items()])
    assert samples == {"a": used} and dict(report.lost) == ({lost: 1} if lost else {})
    others = {f".{end}" for end in members if end.lower() not in ("png", "txt")}
    assert lost or set(report.unused) == others


@pytest.mark.parametrize("caption", [5, None, True, " ", {"en": "x"}, [["x"]], [None], [{"text": "x"}]])
def test_a_caption_that_is_no_text_names_the_fields(tmp_path, caption):
    content = json.dumps({"caption": caption, "id": 1}).encode()
    samples, report = read(tmp_path / "a.tar", ("a.png", PNG), ("a.json", content), ("b.json", content))
    reason = "json has no caption, its keys are caption, id"
    assert samples == {"a": (True, None)} and dict(report.lost) == dict(report.bad) == {reason: 1}


@pytest.mark.parametrize("record", [["x"], "x", None, 5])
def test_json_that_is_no_object_is_named_without_a_picture_too(tmp_path, record):
    samples, report = read(tmp_path / "a.tar", ("a.json", json.dumps(record).encode()))
    assert not samples and dict(report.bad) == {"json has no caption, it is no object": 1}


def test_null_characters_are_bad(tmp_path):
    """They are what UTF-16 without a byte-order mark has between letters."""
    asked = {"prompt": "?", "answer": " A", "domain": "d", "options": ["a", "b"], "correct": 0}
    members = [("a.txt", UTF_16), ("b.json", json.dumps({"caption": "a\0b"}).encode())]
    for number, (field, value) in enumerate([("prompt", "\0"), ("answer", "\0A"), ("options", ["a", "b\0"])]):
        members.append((f"c{number}.json", json.dumps(asked | {field: value}).encode()))
    members.append(("d.json", json.dumps(asked | {"prompt": r"\u0000"}).encode()))
    samples, report = read(tmp_path / "a.tar", *members)
    assert list(samples) == ["d"] and dict(report.bad) == {"text with a null character": 5}


@pytest.mark.parametrize("folder", ["", "d/", "./", "d.e/f/"])
def test_hidden_files_have_no_key(tmp_path, folder):
    """macOS writes ._NAME before each NAME."""
    names = [f"{folder}{hidden}{end}" for end in ("a.png", "a.txt") for hidden in ("._", "")]
    members = [(name, PNG if name.endswith("png") else b"t") for name in names]
    samples, report = read(tmp_path / "a.tar", *members, ("__MACOSX/d/._a.png", b"x"))
    assert samples == {f"{folder}a": (True, "t")} and report.unused == {NO_KEY: 3}
    assert verify_shard(tmp_path / "a.tar").count == 1


@pytest.mark.parametrize(("one", "other"), [("caf\u00e9", "cafe\u0301"), ("./a", "a"), ("d/\u212b", "d/\u00c5")])
def test_two_spellings_of_a_key_are_refused(tmp_path, one, other):
    for names in ((one, other), (other, one)):
        with pytest.raises(UserError, match=r"a\.tar: the keys '.*' and '.*' are one name in two spellings"):
            read(tmp_path / "a.tar", (f"{names[0]}.png", PNG), (f"{names[1]}.txt", b"t"))
        with pytest.raises(UserError, match="two spellings"):
            verify_shard(tmp_path / "a.tar")
    samples, _ = read(tmp_path / "b.tar", (f"{one}.png", PNG), (f"{one}.txt", b"t"), ("A.txt", b"t"), ("B b.txt", b"t"))
    assert samples == {one: (True, "t"), "A": (False, "t"), "B b": (False, "t")}


def test_folders_and_long_names_in_every_format(tmp_path):
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        long = f"{'x' * 200}/{'y' * 200}"
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as tar:
            for name in ("d", "d/a.png.d"):
                folder = tarfile.TarInfo(name)
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
            tar.addfile(tarfile.TarInfo("d/a.cls"))
            for name in (f"{long}.cls", f"{long}.txt"):
                info = tarfile.TarInfo(name)
                info.pax_headers = {"comment": "caf\u00e9"}
                tar.addfile(info)
        report = SampleReport()
        assert not list(iterate(str(tmp_path / f"{number}.tar"), report))
        assert report.first_keys == {"neither image nor caption": ["d/a", long]} and report.total == 2


def test_names_of_tars_and_their_packing(tmp_path):
    """The packing is found by content. What is no tar, or packed twice, is one sentence."""
    read(tmp_path / "a.tar", ("a.txt", b"t"))
    plain = (tmp_path / "a.tar").read_bytes()
    path = tmp_path / "b.tar.gz"
    for content in (plain, gzip.compress(plain), bz2.compress(plain), lzma.compress(plain)):
        path.write_bytes(content)
        assert [sample.key for sample in iterate(str(path))] == ["a"]
    for content in (gzip.compress(gzip.compress(plain)), b"", b"garbage" * 200, b"version https://git-lfs\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read shard .*b\.tar\.gz: damaged or truncated tar at byte 0"):
            list(iterate(str(path)))


@pytest.mark.parametrize(
    ("files", "unread"),
    [
        (["train/a.tar", "validation/a.tar", "test/a.tar", "train/a.tar.index.json", "a.txt"], []),
        (["train/a.tar", "validation/a.tar", "b.tar", ".c.tar"], ["b.tar"]),
        (["train/a.tar", "val/a.tar", "val/b.tgz"], ["val/a.tar", "val/b.tgz"]),
        (["a.tar", "b.tar.gz", "c.tgz"], []),
        (
            ["a.tar", "B.TAR", "c.tar.xz", "d.tar.zst", "e.tbz2", "f.tar.md5"],
            ["B.TAR", "c.tar.xz", "d.tar.zst", "e.tbz2"],
        ),
        (["a.tar", "more/b.tar"], ["more/b.tar"]),
        (["a.tar", "b.jsonl", "c.jsonl.gz", "d.json"], ["b.jsonl", "c.jsonl.gz"]),
        (["b.jsonl", "c.jsonl.gz", "d.jsonl.xz"], ["d.jsonl.xz"]),
        (["more/b.tar"], ["more/b.tar"]),
    ],
)
def test_tars_in_a_folder_that_no_split_reads(tmp_path, files, unread):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert unread_shards(str(tmp_path)) == [str(tmp_path / name) for name in unread]
    assert unread_shards([str(tmp_path)], None) == unread_shards(str(tmp_path))
    both = [str(tmp_path), *(str(tmp_path / name) for name in unread)]
    assert unread_shards(both) == unread_shards(str(tmp_path), both[1:]) == []


def test_a_folder_that_may_not_be_read_is_passed_over():
    with public_folder() as shards:
        for name in ("a.tar", "b.TAR"):
            (shards / name).touch()
        (shards / "lost+found").mkdir(mode=0o700)
        with unprivileged():
            assert unread_shards(str(shards)) == [str(shards / "b.TAR")]
