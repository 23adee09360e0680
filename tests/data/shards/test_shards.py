"""Shards: repeatable writing, every way to name them, errors that name damage, and counts of bad samples."""

import gzip
import io
import json
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from moe_dist.core.errors import UserError
from moe_dist.data.shards.sample_report import SampleReport
from moe_dist.data.shards.samples import MAX_MEGAPIXELS, to_rgb
from moe_dist.data.shards.shard_index import user_cache, verify_shard
from moe_dist.data.shards.tars import SPLITS, Shard, iterate, resolve_shards, split_of, verify_shards, write_shards
from moe_dist.parallel.agreement import raise_on_all_ranks
from tests.support.permissions import public_folder, unprivileged


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return the header of a PNG of this size, without pixels; decoding it would need width * height * 3 bytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def own_tar(tmp_path):
    """Write a user's own flat folder: one shard of 20 .jpg + .json pairs."""
    folder = tmp_path / "own"
    folder.mkdir()
    members = {}
    for i in range(20):
        members[f"{i:05d}.jpg"] = encoded(Image.new("RGB", (40, 30), (i, 0, 0)), "JPEG")
        members[f"{i:05d}.json"] = json.dumps({"caption": f"picture {i}", "width": 40}).encode()
    return write_tar(folder / "mine.tar", members)


def test_same_samples_give_the_same_bytes_in_any_order(emoji_samples, tmp_path):
    counts = write_shards(emoji_samples, tmp_path / "a", samples_per_shard=50)
    write_shards(list(reversed(emoji_samples)), tmp_path / "b", samples_per_shard=50)
    assert counts == {"train": 132, "validation": 32, "test": 32}
    names = sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*.*"))
    assert [n for n in names if n.startswith("train")] == [
        f"train/shard-00000{i}.tar{suffix}" for i in range(3) for suffix in ("", ".index.json")
    ]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_what_is_written_is_read_back(emoji_samples, emoji_shards):
    read = {}
    for split in SPLITS:
        shards = resolve_shards(str(emoji_shards), split)
        samples = [sample for shard in shards for sample in iterate(shard)]
        assert verify_shards(shards) == len(samples)
        read |= {sample.key: (split, sample) for sample in samples}
    assert read.keys() == {sample.key for sample in emoji_samples}
    for sample in emoji_samples:
        split, raw = read[sample.key]
        assert (split, raw.caption, raw.image.mode, raw.image.size) == (sample.split, sample.caption, "RGB", (64, 64))
        assert raw.image.tobytes() == Image.open(io.BytesIO(sample.png)).convert("RGB").tobytes()


def test_samples_are_mixed_over_the_shards(emoji_shards):
    for shard in resolve_shards(str(emoji_shards))[:-1]:
        vendors = {sample.key.partition("-")[0] for sample in iterate(shard)}
        assert vendors == {"noto", "fluent"}


def test_two_samples_of_one_key_are_refused(emoji_samples, tmp_path):
    with pytest.raises(ValueError, match="same key"):
        write_shards([*emoji_samples, emoji_samples[3]], tmp_path / "a")


# ------------------------------------------------------------------------------------------------------ finding


def test_prepared_folder_serves_its_own_splits(emoji_shards):
    for spec in (str(emoji_shards), str(emoji_shards / "train")):
        assert resolve_shards(spec, "train") == [Shard(str(p)) for p in sorted((emoji_shards / "train").glob("*.tar"))]
        assert {Path(s.url).parent.name for s in resolve_shards(spec, "validation")} == {"validation"}


def test_flat_folder_is_split_by_the_hash_of_the_key(own_tar):
    keys = {split: [s.key for x in resolve_shards(str(own_tar.parent), split) for s in iterate(x)] for split in SPLITS}
    assert sorted(key for mine in keys.values() for key in mine) == [f"{i:05d}" for i in range(20)]
    assert all(split_of(key) == split for split, mine in keys.items() for key in mine)
    assert len(keys["train"]) >= 15


def test_a_train_folder_alone_shares_no_sample_between_its_splits(own_tar, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train").symlink_to(own_tar.parent)
    keys = [
        {sample.key for shard in resolve_shards(str(tmp_path / "corpus"), split) for sample in iterate(shard)}
        for split in ("train", "validation", "test")
    ]
    assert len(set.union(*keys)) == sum(map(len, keys)) == 20


def test_validation_shards_leave_all_of_a_flat_folder_for_training(own_tar, emoji_shards):
    spec, validation = str(own_tar.parent), str(emoji_shards / "validation")
    assert resolve_shards(spec, "train", validation) == [Shard(str(own_tar))]
    assert len(resolve_shards(spec, "validation", validation)) == 2
    held_out = resolve_shards(spec, "validation", str(emoji_shards))
    assert held_out == resolve_shards(str(emoji_shards), "validation")


def test_split_fractions():
    counts = {split: sum(split_of(f"key {i}") == split for i in range(4000)) for split in SPLITS}
    assert 3500 < counts["train"] < 3700 and 140 < counts["validation"] < 260 and 140 < counts["test"] < 260


def test_braces_urls_and_lists(emoji_shards, own_tar):
    braces = f"{emoji_shards}/train/shard-{{000000..000002}}.tar"
    assert [Path(s.url).name for s in resolve_shards([braces, str(own_tar.parent)])] == [
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
        "mine.tar",
    ]
    remote = [s.url for s in resolve_shards("https://example.org/data/{00..02}.tar")]
    assert remote == [f"https://example.org/data/{i:02d}.tar" for i in range(3)]
    assert verify_shards([Shard(url) for url in remote]) == 0  # a remote shard has no index, and causes no request here


def test_pipe_and_file_urls_and_compressed_tars_are_read(own_tar, tmp_path):
    compressed = tmp_path / "mine.tar.gz"
    compressed.write_bytes(gzip.compress(own_tar.read_bytes()))
    for url in (f"pipe:cat {own_tar}", f"file:{own_tar}", str(compressed)):
        assert [sample.caption for sample in iterate(url)] == [f"picture {i}" for i in range(20)]
    first = next(iter(iterate(f"pipe:cat {own_tar}")))  # stopping early raises no error
    assert first.key == "00000"


@pytest.mark.parametrize("spec", ["nowhere/shards", "nowhere/{000..001}.tar"])
def test_missing_shards_are_named(spec):
    with pytest.raises(UserError, match="nowhere/"):
        resolve_shards(spec)


def test_empty_folder_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path} holds no .tar files"):
        resolve_shards(str(tmp_path))


# ----------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.97])
def test_truncated_tar_is_found_by_its_index(own_tar, keep):
    verify_shard(own_tar)
    own_tar.write_bytes(own_tar.read_bytes()[: int(keep * own_tar.stat().st_size)])
    with pytest.raises(UserError, match=r"mine.tar is truncated"):
        verify_shards(resolve_shards(str(own_tar.parent)))


def test_flipped_bit_is_found_by_its_index(own_tar):
    verify_shard(own_tar)
    content = bytearray(own_tar.read_bytes())
    content[len(content) // 2] ^= 1
    own_tar.write_bytes(content)
    with pytest.raises(UserError, match=r"mine.tar is corrupt"):
        verify_shards(resolve_shards(str(own_tar.parent)))


def offsets(tar: Path) -> list[int]:
    with tarfile.open(tar) as opened:
        return [member.offset for member in opened]


@pytest.mark.parametrize("damage", ["header", "between members", "inside a member", "inside a header"])
@pytest.mark.parametrize("reader", ["index", "local", "pipe"])
def test_damage_without_an_index_is_found_too(own_tar, damage, reader):
    content, tenth = bytearray(own_tar.read_bytes()), offsets(own_tar)[20]
    if damage == "header":
        content[tenth + 5] ^= 1
    else:
        content = content[: tenth + {"between members": 0, "inside a member": 600, "inside a header": 100}[damage]]
    own_tar.write_bytes(content)
    with pytest.raises(UserError, match=r"mine.tar"):
        if reader == "index":
            verify_shards(resolve_shards(str(own_tar.parent)))
        else:
            list(iterate(str(own_tar) if reader == "local" else f"pipe:cat {own_tar}"))
    assert not list(own_tar.parent.glob("*.index.json"))


def test_unreadable_url_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read shard pipe:cat"):
        list(iterate(f"pipe:cat {tmp_path}/nothing.tar 2>/dev/null"))


@pytest.mark.parametrize("members", [{}, {"README": b"no sample"}])
def test_a_tar_without_samples_is_counted(tmp_path, members):
    tar = write_tar(tmp_path / "empty.tar", members)
    assert verify_shard(tar).count == 0
    for split in (None, "train"):
        report = SampleReport()
        assert not list(iterate(Shard(str(tar), split), report)) and report.total == 0
        assert report.unused["shards without samples"] == 1


@pytest.fixture
def public_tar(own_tar, monkeypatch):
    """Return a shard in a folder that only its owner may write, and a cache folder that everybody may write."""
    verify_shard(own_tar)  # import what is needed before permissions are dropped
    with public_folder() as folder:
        (folder / "cache").mkdir()
        (folder / "cache").chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        (folder / "own").mkdir()
        yield Path(shutil.copy(own_tar, folder / "own"))
        (folder / "own").chmod(0o755)


def test_index_of_a_read_only_folder_lies_in_the_cache(public_tar):
    public_tar.parent.chmod(0o555)
    with unprivileged():
        built = verify_shard(public_tar)
        assert built.count == 20 and not list(public_tar.parent.glob("*.json"))
        assert len(list(user_cache().rglob("*.index.json"))) == 1
        assert verify_shard(public_tar) == built
    public_tar.write_bytes(public_tar.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"mine.tar is truncated"):
        verify_shard(public_tar)


def test_an_index_that_can_be_written_nowhere(public_tar):
    public_tar.parent.chmod(0o555)
    user_cache().parent.chmod(0o555)
    with unprivileged(), pytest.raises(UserError) as error:
        verify_shard(public_tar)
    tried = f"tried {public_tar.parent} and {user_cache()}/shards (Permission denied)"
    assert str(error.value) == f"the index of shard {public_tar} cannot be written: {tried}"


@pytest.mark.parametrize("indexed", [False, True])
def test_a_shard_that_may_not_be_read(public_tar, indexed):
    if indexed:
        verify_shard(public_tar)
    public_tar.chmod(0o000)
    with unprivileged(), pytest.raises(UserError, match=r"mine.tar: Permission denied"), raise_on_all_ranks():
        verify_shard(public_tar)


# ------------------------------------------------------------------------------------------------------ bad samples


def test_bad_samples_are_skipped_counted_and_named(tmp_path):
    picture = encoded(Image.new("RGB", (8, 8)), "PNG")
    tar = write_tar(
        tmp_path / "a.tar",
        {
            "good.png": picture,
            "good.txt": b"a caption",
            "nocaption.webp": encoded(Image.new("RGB", (8, 8)), "WEBP"),
            "textonly.json": b'{"text": "only words"}',
            "cut.png": picture[: len(picture) // 2],
            "cut.txt": b"x",
            "nonsense.jpg": b"not an image",
            "bomb.png": png_header(60_000, 60_000),
            "large.png": png_header(9_000, 9_000),
            "neither.json": b'{"url": "https://example.org"}',
            "latin.txt": "caf\u00e9".encode("latin-1"),
        },
    )
    report = SampleReport()
    samples = list(iterate(str(tar), report))
    assert [(s.key, s.image and s.image.size, s.caption) for s in samples] == [
        ("good", (8, 8), "a caption"),
        ("nocaption", (8, 8), None),
        ("textonly", None, "only words"),
    ]
    assert report.total == 9
    assert dict(report.bad) == {
        "undecodable image": 2,
        "oversized image": 2,
        "json has no caption, its keys are url": 1,
        "undecodable caption": 1,
    }
    assert report.first_keys["oversized image"] == ["bomb", "large"]


def test_too_many_bad_samples_end_the_run(tmp_path):
    report = SampleReport(total=200)
    report.add_bad("oversized image", "a")
    other = SampleReport(total=100)
    for key in "bcde":
        other.add_bad("undecodable image", key)
    report.merge(other)
    report.check(0.02)
    with pytest.raises(UserError, match=r"5 of 300 samples skipped: 4 undecodable image \(b, c, d\), 1 oversized"):
        report.check(0.01)


def test_a_split_without_samples_is_named_with_the_cure():
    with pytest.raises(UserError, match=r"^the shards of the test split hold no samples$"):
        SampleReport().check_samples("test")
    with pytest.raises(UserError, match=r"none of the 7 samples .* belongs to the validation split.*validation_shards"):
        SampleReport(other_splits=7).check_samples("validation")
    SampleReport(total=1).check_samples("train")


def test_limit_of_the_image_size_is_exact(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"a.png": encoded(Image.new("RGB", (1000, 1000)), "PNG")})
    assert len(list(iterate(str(tar), max_megapixels=1.0))) == 1
    assert len(list(iterate(str(tar), max_megapixels=0.999))) == 0
    assert MAX_MEGAPIXELS == 64


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("I;16", (2, 2), 65535), (255, 255, 255)),
        (Image.new("I;16", (2, 2), 257), (1, 1, 1)),
    ],
)
def test_every_mode_becomes_rgb(image, expected):
    assert to_rgb(image).getpixel((0, 0)) == expected
