"""Emoji as image-caption pairs: images from Noto (Apache-2.0), Twemoji (CC-BY-4.0) and Fluent 3D (MIT).

The captions are made from emojibase (MIT), for example: "deciduous tree. forest, shedding, green, deciduous, tree,
habitat. (animals & nature: other plants)"

The order of the keywords is drawn by hash for each image. If it were emojibase's alphabetical order, all vendors'
images of an emoji would share one caption, and a model would memorize it. All variants of an emoji (skin tones,
genders and vendors) are in the same split.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moe_dist.core.strict import Positive, Strict
from moe_dist.corpora.packages import fetch_npm, read_npm
from moe_dist.data.shards.samples import decode_image, encode_png
from moe_dist.data.shards.tars import Sample, split_of

NOTO, TWEMOJI, FLUENT, NAMES = (
    "emoji-datasource-google@16.0.0",
    "emoji-datasource-twitter@16.0.0",
    "@lobehub/fluent-emoji-3d@1.1.0",
    "emojibase-data@17.0.0",
)
IMAGE_FOLDERS = {  # vendor -> package, folder of its images
    "noto": (NOTO, "img/google/64/"),
    "twemoji": (TWEMOJI, "img/twitter/64/"),
    "fluent": (FLUENT, "assets/"),
}
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
GENDER_SIGNS = {"2640", "2642"}
PEOPLE = {"1F468": "1F9D1", "1F469": "1F9D1"}  # man, woman -> person
JOINERS = {"200D", "FE0F"}


@dataclass(frozen=True, slots=True)
class EmojiEntry:
    vendor: str
    code: str  # code points without variation selectors, e.g. 1F44B-1F3FB
    image: bytes  # the vendor's file
    meta: dict[str, Any]  # label, keywords, group, subgroup

    @property
    def caption(self) -> str:
        ordered = sorted(self.meta["keywords"], key=lambda word: _digest(f"{self.vendor} {self.code} {word}"))
        return f"{self.meta['label']}. {', '.join(ordered)}. ({self.meta['group']}: {self.meta['subgroup']})"


class Emoji(Strict):
    """Corpus of emoji with captions.

    size: the width and height of the images in pixels.
    base: whether to leave out skin-tone variants, which make up about half of the pairs.
    """

    licence: ClassVar[str] = "Noto Apache-2.0; Twemoji CC-BY-4.0; Fluent MIT; emojibase captions MIT"

    size: Positive = 64
    base: bool = False

    def fetch(self, downloads: Path) -> None:
        fetch_npm([NOTO, TWEMOJI, FLUENT, NAMES], downloads)

    def entries(self, downloads: Path) -> list[EmojiEntry]:
        captions = read_captions(downloads, base=self.base)
        return [
            EmojiEntry(vendor, code, image, captions[code])
            for vendor, (package, folder) in IMAGE_FOLDERS.items()
            for code, image in _images(package, folder, downloads).items()
            if code in captions
        ]

    def sample(self, entry: EmojiEntry) -> Sample:
        concept = base_concept(entry.code)
        meta = {"vendor": entry.vendor, "code": entry.code, "concept": concept} | entry.meta
        png = encode_png(decode_image(entry.image), self.size)
        return Sample(f"{entry.vendor}-{entry.code.lower()}", split_of(concept), png, entry.caption, meta)


def base_concept(code: str) -> str:
    """Return an emoji's code without skin tone, gender and joiners.

    Emoji with the same result are in the same split.
    """
    parts = [PEOPLE.get(part, part) for part in code.split("-")]
    kept = [part for part in parts if part not in SKIN_TONES | GENDER_SIGNS | JOINERS]
    return "-".join(kept or parts)


def read_captions(downloads: Path, *, base: bool) -> dict[str, dict[str, Any]]:
    """Return a dict from each emoji's code to its label, keywords, group and subgroup.

    base: whether to leave out skin-tone variants.
    """
    return dict(_captions(downloads, base))


def _images(package: str, folder: str, downloads: Path) -> dict[str, bytes]:
    """Return the images in a vendor's package, keyed by the emoji's code without variation selectors.

    If the codes of several images differ only in variation selectors, only one of these images is returned.
    """
    pattern = re.compile(re.escape(folder) + r"[0-9a-f-]+\.(png|webp)")
    files = read_npm(package, downloads, lambda path: pattern.fullmatch(path) is not None)
    return {_normal(Path(path).stem.upper()): image for path, image in sorted(files.items())}


def _captions(downloads: Path, base: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each emoji's code, and a dict with its label, keywords, group and subgroup.

    Emoji without a group are left out. If `base` is true, skin-tone variants are left out, too.
    """
    files = read_npm(NAMES, downloads, lambda path: path in ("en/data.json", "en/messages.json"))
    messages = json.loads(files["en/messages.json"])
    groups = {item["order"]: item["message"] for item in messages["groups"]}
    subgroups = {item["order"]: item["message"] for item in messages["subgroups"]}
    for emoji in json.loads(files["en/data.json"]):
        if "group" not in emoji:  # regional indicator letters
            continue
        keywords = emoji.get("tags", [])
        group, subgroup = groups[emoji["group"]], subgroups[emoji["subgroup"]]
        for variant in [emoji] if base else [emoji, *emoji.get("skins", [])]:
            meta = {"label": variant["label"], "keywords": keywords, "group": group, "subgroup": subgroup}
            yield _normal(variant["hexcode"]), meta


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _normal(code: str) -> str:
    return "-".join(part for part in code.split("-") if part != "FE0F")
