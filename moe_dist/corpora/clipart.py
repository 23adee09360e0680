"""Clip art as image-caption pairs: Debian's openclipart (public domain), with captions from the drawings' metadata.

Example: "Lightly Decorated Evergreen. evergreen, decoration, tree, plant, xmas. (decorations)"
"""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from moe_dist.core.strict import Positive, Strict
from moe_dist.corpora.packages import fetch_debian, read_debian
from moe_dist.data.shards.samples import BadSample, decode_image, encode_png
from moe_dist.data.shards.tars import Sample, split_of

PNG, SVG = "openclipart-png", "openclipart-svg"
ROOT = "usr/share/openclipart"
CLIPART_MEGAPIXELS = 4.0  # larger drawings are left out; the largest has 231
MAX_SAME_TITLE = 10  # a title shared by more drawings names a collection ("Lemon SVG theme"), not a drawing
EMPTY_KEYWORDS = {"", "hash", "unsorted"}


@dataclass(frozen=True, slots=True)
class ClipartEntry:
    key: str
    image: bytes
    title: str
    keywords: list[str]
    folders: tuple[str, ...]  # e.g. ("animals", "birds")


class ClipArt(Strict):
    """Corpus of clip art with captions.

    size: the width and height of the images in pixels. Non-square drawings get white margins.
    """

    licence: ClassVar[str] = "public domain (openclipart.org)"

    size: Positive = 64

    def fetch(self, downloads: Path) -> None:
        fetch_debian([PNG, SVG], downloads)

    def entries(self, downloads: Path) -> list[ClipartEntry]:
        """Return the drawings that can get a caption.

        A drawing is left out if it has no title, or if more than MAX_SAME_TITLE drawings have its title. Symbolic links
        and icon themes are left out, too.
        """
        drawings = read_debian(SVG, downloads, lambda path: path.endswith(".svg") and "/icons/" not in path)
        described = {_name(path): _describe(svg.decode(errors="replace")) for path, svg in sorted(drawings.items())}
        same_title = Counter(title for title, _ in described.values())
        kept = {n for n, (title, _) in described.items() if title and same_title[title] <= MAX_SAME_TITLE}
        images = read_debian(PNG, downloads, lambda path: path.endswith(".png") and _name(path) in kept)
        return [
            ClipartEntry(_key(name), image, *described[name], PurePosixPath(name).parts[:-1])
            for name, image in sorted((_name(path), image) for path, image in images.items())
        ]

    def sample(self, entry: ClipartEntry) -> Sample | None:
        try:
            image = decode_image(entry.image, CLIPART_MEGAPIXELS)
        except BadSample:
            return None
        concept = re.sub(r"[^a-z]+", "-", entry.title.lower()).strip("-") or entry.title
        meta: dict[str, Any] = {"title": entry.title, "keywords": entry.keywords, "concept": concept}
        return Sample(entry.key, split_of(concept), encode_png(image, self.size), _caption(entry), meta)


def _caption(entry: ClipartEntry) -> str:
    parts = [entry.title, ", ".join(entry.keywords), f"({': '.join(entry.folders).replace('_', ' ')})"]
    return ". ".join(part for part in parts if part)


def _describe(svg: str) -> tuple[str, list[str]]:
    """Return the title and the keywords in the RDF metadata of a drawing. A missing title is returned as "".

    Regular expressions are used because some files are not well-formed XML.
    """
    title = re.search(r"<dc:title>(.*?)</dc:title>", svg, re.DOTALL)
    keywords = [_clean(word) for word in re.findall(r"<rdf:li>(.*?)</rdf:li>", svg, re.DOTALL)]
    name = re.sub(r"^Clipart by [^-]* - ", "", _clean(title[1])) if title else ""
    return name, [word for word in keywords if word not in EMPTY_KEYWORDS]


def _clean(text: str) -> str:
    return " ".join(html.unescape(text).replace("_", " ").split())


def _name(path: str) -> str:
    """Return a drawing's path relative to the package's png/ or svg/ folder, without the file suffix."""
    return str(PurePosixPath(path).relative_to(ROOT).with_suffix("")).partition("/")[2]


def _key(name: str) -> str:
    return "clipart-" + re.sub(r"[^A-Za-z0-9_]", "-", name)
