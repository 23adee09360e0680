"""Nothing of a sample vanishes without a count: formats, links, dotted names, captions, and the order of a tar."""

import gzip
import io
import itertools
import json
import random
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moe_dist.core.errors import UserError
from moe_dist.data.shards.sample_report import OTHERS, REASONS_KEPT, Loss, SampleReport
from moe_dist.data.shards.samples import AVIF, IMAGE_SUFFIXES
from moe_dist.data.shards.shard_index import verify_shard
from moe_dist.data.shards.tars import iterate

LINK = None


def picture(kind: str, **options) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 30, 40)).save(out, kind, **options)
    return out.getvalue()


PNG = picture("PNG")
WITHOUT_CAPTION = "json has no caption, its keys are "


def write_tar(path: Path, members: list[tuple[str, bytes | None]], *, link_type: bytes = tarfile.SYMTYPE) -> Path:
    """Write members in this order. Content None: a link to the first member."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = link_type, members[0][0]
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))
    return path


def read(path: Path) -> tuple[dict[str, tuple[bool, str | None]], SampleReport]:
    """Return key -> (has a picture, caption) of the samples read, and the report."""
    report = SampleReport()
    samples = list(iterate(str(path), report))
    return {sample.key: (sample.image is not None, sample.caption) for sample in samples}, report


# ------------------------------------------------------------------------------------------------ parts of samples


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        *[("gif", "GIF"), ("bmp", "BMP"), ("tif", "TIFF"), ("tiff", "TIFF"), ("jfif", "JPEG"), ("jpe", "JPEG")],
        ("webp", "WEBP"),
        pytest.param("avif", "AVIF", marks=pytest.mark.skipif(not AVIF, reason="Pillow was built without AVIF")),
    ],
)
def test_images_that_pillow_decodes_are_used(tmp_path, suffix, kind):
    path = write_tar(tmp_path / "a.tar", [(f"a.{suffix}", picture(kind)), ("a.txt", b"red")])
    (sample,) = iterate(str(path), report := SampleReport())
    assert sample.caption == "red" and sample.image.mode == "RGB" and sample.image.size == (8, 6)
    assert all(abs(x - y) < 24 for x, y in zip(sample.image.getpixel((3, 3)), (200, 30, 40), strict=True))
    assert report.used == report.total == 1 and suffix in IMAGE_SUFFIXES


def test_of_a_gif_the_first_frame_is_used(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    (sample,) = iterate(str(write_tar(tmp_path / "a.tar", [("a.gif", out.getvalue())])))
    assert sample.image.getpixel((0, 0)) == (255, 0, 0)


def png_with(kind: str, mebibytes: int) -> bytes:
    """Return a PNG with a colour profile, or with a plain (tEXt) or compressed (zTXt, iTXt) text, of this size."""
    if kind == "iCCP":
        return picture("PNG", icc_profile=bytes(mebibytes << 20))
    info = PngInfo()
    add = info.add_itxt if kind == "iTXt" else info.add_text
    add("parameters", "x" * (mebibytes << 20), zip=kind != "tEXt")
    return picture("PNG", pnginfo=info)


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iCCP"])
def test_a_png_with_a_long_text_or_profile_is_used_within_bounds(tmp_path, kind):
    bad = 65 if kind == "tEXt" else 17
    members = [("a.png", png_with(kind, 3)), ("a.txt", b"t"), ("b.png", png_with(kind, bad)), ("b.txt", b"t")]
    samples, report = read(write_tar(tmp_path / "a.tar", members))
    assert samples == {"a": (True, "t")} and dict(report.bad) == {"PNG text or colour profile above 16 MiB": 1}


def test_a_tiff_of_values_without_a_range_is_bad(tmp_path):
    out = io.BytesIO()
    Image.new("F", (4, 4), 0.5).save(out, "TIFF")
    used, report = read(write_tar(tmp_path / "a.tar", [("a.tiff", out.getvalue()), ("a.txt", b"x")]))
    assert not used and report.bad == {"image of 32-bit values": 1}


@pytest.mark.parametrize(
    ("members", "reason", "key", "used"),
    [
        ({"psd": b"x", "txt": b"t"}, "image member .psd is not supported", "a", (False, "t")),
        ({"heic": b"x", "json": b'{"text": "t"}'}, "image member .heic is not supported", "a", (False, "t")),
        ({"svg": b"x"}, "image member .svg is not supported", "a", None),
        (
            *({"input.jpg": PNG, "txt": b"t"}, "image member whose name has a second dot before .jpg"),
            *("a.input.jpg", (False, "t")),
        ),
        (
            *({"png": PNG, "txt": b"t", "v2.png": PNG}, "image member whose name has a second dot before .png"),
            *("a.v2.png", (True, "t")),
        ),
        (
            {"png": PNG, "v2.txt": b"t"},
            "caption member whose name has a second dot before .txt",
            "a.v2.txt",
            (True, None),
        ),
        ({"png": PNG, "caption": b"t"}, "caption member .caption is not read, .txt is", "a", (True, None)),
        ({"caption": b"t"}, "caption member .caption is not read, .txt is", "a", None),
        ({"jpg": LINK, "txt": b"t"}, "image member is a link", "a", (False, "t")),
        ({"png": PNG, "txt": LINK}, "caption member is a link", "a", (True, None)),
        ({"jpg": LINK}, "image member is a link", "a", None),
        (
            {"png": PNG, "json": b'{"id": 3, "dialogue": []}'},
            WITHOUT_CAPTION + "dialogue, id",
            "a",
            (True, None),
        ),
        ({"png": PNG, "json": b'{"caption": 5}'}, WITHOUT_CAPTION + "caption", "a", (True, None)),
        ({"png": PNG, "json": b'["t"]'}, "json has no caption, it is no object", "a", (True, None)),
        ({"jpg": LINK, "json": b'{"prompt": "p", "answer": "a", "domain": "d"}'}, "image member is a link", "a", None),
    ],
)
@pytest.mark.parametrize("link_type", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_lost_part_is_counted_by_reason(tmp_path, members, reason, key, used, link_type):
    files = [("0.png", PNG), *[(f"a.{suffix}", content) for suffix, content in members.items()]]
    samples, report = read(write_tar(tmp_path / "a.tar", files, link_type=link_type))
    assert samples.get("a") == used
    assert dict(report.lost) == {reason: 1} and report.first_keys == {reason: [key]} and not report.bad
    assert report.total == 2 and report.used == 1
    with pytest.raises(UserError, match=r"0 of 2 samples skipped; 1 of 2 lost a part: 1 .* \(a.*max_bad_fraction=0.4 "):
        report.check(0.4)
    report.check(0.5)


def test_what_the_recipe_does_not_want_is_not_lost(tmp_path):
    _, report = read(write_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.caption", b"t")]))
    report.check(0.0, ("caption ",))
    with pytest.raises(UserError, match="lost a part"):
        report.check(0.0, ("image ",))


@pytest.mark.parametrize(
    ("members", "caption", "unused"),
    [
        ({"txt": b" ", "json": b'{"caption": "from json"}'}, "from json", {}),
        (
            {"txt": b"t", "json": b'{"caption": "c", "width": 40}'},
            "t",
            {"json field caption": 1, "json field width": 1},
        ),
        ({"txt": b"t", "json": b"not json"}, "t", {".json": 1}),
        ({"txt": b"t", "json": b'["t"]'}, "t", {".json": 1}),
        ({"json": b'{"caption": "", "text": "second"}'}, "second", {"json field caption": 1}),
        ({"json": b'{"caption": ["a"], "text": "a string first"}'}, "a string first", {"json field caption": 1}),
        ({"json": b'{"caption": ["only"]}'}, "only", {}),
        ({"txt": b"t", "cls": b"3", "caption": b"c", "jpg": LINK}, "t", {".cls": 1, ".caption": 1, ".jpg": 1}),
        ({"txt": b"t", "gif": PNG, "depth": b"x"}, "t", {".gif": 1, ".depth": 1}),
        ({"txt": b""}, None, {}),
    ],
)
def test_what_is_unused_by_design_is_counted_by_name(tmp_path, members, caption, unused):
    files = [("a.png", PNG), *[(f"a.{suffix}", content) for suffix, content in members.items()]]
    samples, report = read(write_tar(tmp_path / "a.tar", files))
    assert samples == {"a": (True, caption)} and dict(report.unused) == unused
    assert report.used == 1


def test_members_without_a_key_are_counted(tmp_path):
    samples, report = read(write_tar(tmp_path / "a.tar", [("README", b"x"), ("._a.png", b"x"), ("a.png", PNG)]))
    assert samples == {"a": (True, None)} and dict(report.unused) == {"members without key and ending": 2}


@pytest.mark.parametrize("name", ["caption", "text"])
def test_all_captions_of_a_list_are_read(tmp_path, name):
    members = [("a.png", PNG), ("a.json", json.dumps({name: ["one", " ", "two", 3]}).encode())]
    members += [("b.json", json.dumps({name: ["three", "four"]}).encode())]
    report = SampleReport()
    samples = list(iterate(str(write_tar(tmp_path / "a.tar", members)), report))
    assert [sample.captions for sample in samples] == [("one", "two"), ("three", "four")]
    assert [sample.texts for sample in samples] == [sample.captions for sample in samples], "tokenizers learn from all"
    assert report.used == 2 and dict(report.unused) == {f"entries without text in json field {name}": 1}


def test_a_report_is_bounded_and_survives_its_json():
    report = SampleReport(total=500)
    for i in range(300):
        report.add_lost(Loss(f"reason {i}", f"key {i}"))
    report.add_unused(f".{i}" for i in range(300))
    report.add_bad("undecodable image", "b")
    assert report.lost.total() == report.unused.total() == 300 and report.used == 199
    assert len(report.lost) == len(report.unused) == REASONS_KEPT + 1 and report.lost[OTHERS] == 200
    again = SampleReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report
    again.merge(report)
    assert again.lost.total() == 600 and again.total == 1000 and len(again.lost) == REASONS_KEPT + 1


# --------------------------------------------------------------------------------------------- structure of the tar


@pytest.fixture(params=["index", "local", "pipe"])
def reader(request):
    """Return a function that reads a tar, in one of three ways."""

    def read_tar(path: Path) -> None:
        if request.param == "index":
            verify_shard(path)
        else:
            list(iterate(str(path) if request.param == "local" else f"pipe:cat {path}"))

    return read_tar


def test_a_key_that_comes_back_is_refused(tmp_path, reader):
    members = [(f"{i}.png", PNG) for i in range(3)] + [(f"{i}.txt", b"t") for i in range(3)]
    path = write_tar(tmp_path / "apart.tar", members)
    with pytest.raises(UserError, match=r"apart\.tar: the key '0' comes back after other samples.*`tar --sort=name`"):
        reader(path)
    reader(write_tar(tmp_path / "sorted.tar", sorted(members)))


def test_a_member_that_stands_twice_is_refused(tmp_path, reader):
    with pytest.raises(UserError, match=r"a\.tar: the sample 'a' has two members \.jpg"):
        reader(write_tar(tmp_path / "a.tar", [("a.JPG", PNG), ("a.jpg", PNG)]))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("gap", [0, 10_240, 3 << 20])
def test_what_follows_the_end_of_a_tar_is_not_lost_in_silence(tmp_path, reader, suffix, gap):
    pack = gzip.compress if suffix == "tar.gz" else bytes
    a, b = (write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", PNG)]).read_bytes() for name in "ab")
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(pack(a + bytes(gap)))
    reader(path)
    path.with_name(path.name + ".index.json").unlink(missing_ok=True)
    for content in (pack(a + bytes(gap)) + pack(b), pack(a + bytes(gap) + b)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"c\.{suffix}.*bytes follow its end-of-archive marker.*tar --concatenate"):
            reader(path)


# -------------------------------------------------------------------------------------------------------- any tar

PARTS = {
    "png": [PNG, PNG[:40], b"", LINK],
    "gif": [picture("GIF"), b"GIF89a", LINK],
    "psd": [b"8BPS"],
    "v2.jpg": [picture("JPEG")],
    "txt": [b"text", b" ", b"\xff\xfe", LINK],
    "json": [b'{"caption": "c"}', b'{"text": ["a", "b"]}', b'{"id": 1}', b"{}", b"[1]", b"{", LINK],
    "caption": [b"c"],
    "cls": [b"1", LINK],
}


@pytest.mark.parametrize("seed", range(20))
def test_used_bad_and_lost_samples_are_the_samples_written(tmp_path, seed):
    chance = random.Random(seed)
    groups = []
    for number in range(25):
        suffixes = chance.sample(list(PARTS), chance.randint(1, 4))
        groups.append([(f"{number:03d}.{suffix}", chance.choice(PARTS[suffix])) for suffix in suffixes])
    chance.shuffle(groups)
    members = [member for group in groups for member in group]
    path = write_tar(tmp_path / "a.tar", members)
    samples, report = read(path)
    assert report.total == len(groups) == verify_shard(path).count
    assert report.used + report.bad.total() + report.lost.total() == len(groups) and report.used >= 0
    whole = {sample.key for sample in iterate(str(path)) if sample.loss is None}
    assert len(whole) == report.used and whole <= samples.keys()
    content = {name.partition(".")[0]: dict(group) for group in groups for name, _ in group}
    for key in whole:  # a whole sample shows a picture if it has one, and its text
        files = content[key]
        assert samples[key][0] == any(files.get(f"{key}.{end}") for end in ("png", "gif"))
        assert samples[key][1] == "text" or files.get(f"{key}.txt") != b"text"

    chance.shuffle(members)
    write_tar(path, members)
    keys = [name.partition(".")[0] for name, _ in members]
    runs = 1 + sum(one != other for one, other in itertools.pairwise(keys))
    if runs > len(set(keys)):
        with pytest.raises(UserError, match="comes back"):
            read(path)
