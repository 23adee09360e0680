"""One raw sample of a shard, decoded: an RGB image, a caption, or both; and the account of those that could not be.

A sample is the group of a tar's members that share a key: `.jpg`, `.jpeg`, `.png` or `.webp` for the image, `.txt` for
the caption, or `.json` with the field `caption` or `text`. Other members are ignored.
"""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image, ImageOps

from moe_dist.errors import UserError

MAX_MEGAPIXELS = 64.0  # read from the header: a larger image is never decoded (decompression bombs)
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_FIELDS = ("caption", "text")
KEYS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class RawSample:
    """A decoded sample; at least one of image and caption is there."""

    key: str
    image: Image.Image | None  # mode RGB, its own size
    caption: str | None


class BadSample(Exception):
    """Why a sample cannot be used, in two or three words: the reason under which it is counted."""


@dataclass(slots=True)
class SampleReport:
    """How many samples were read and which were skipped, by reason. Reports of several shards add up with merge()."""

    total: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first_keys: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few keys

    def add_bad(self, reason: str, key: str) -> None:
        self.bad[reason] += 1
        keys = self.first_keys.setdefault(reason, [])
        if len(keys) < KEYS_SHOWN:
            keys.append(key)

    def merge(self, other: SampleReport) -> None:
        """Add the counts of another report to this one."""
        self.total += other.total
        self.bad.update(other.bad)
        for reason, keys in other.first_keys.items():
            self.first_keys[reason] = (self.first_keys.get(reason, []) + keys)[:KEYS_SHOWN]

    def summary(self) -> str:
        """One line: `3 of 200 samples skipped: 2 undecodable image (a, b), 1 oversized image (c)`."""
        reasons = [f"{n} {reason} ({', '.join(self.first_keys[reason])})" for reason, n in self.bad.most_common()]
        return f"{self.bad.total()} of {self.total} samples skipped" + (f": {', '.join(reasons)}" if reasons else "")

    def check(self, max_bad_fraction: float) -> None:
        """Raise UserError if more than this fraction of the samples was skipped, or if there was no sample at all."""
        if self.total == 0:
            raise UserError("the shards hold no samples of this split")
        if self.bad.total() > max_bad_fraction * self.total:
            raise UserError(f"{self.summary()}; data.max_bad_fraction={max_bad_fraction} allows fewer")


def decode_sample(members: Mapping[str, bytes], *, max_megapixels: float = MAX_MEGAPIXELS) -> RawSample:
    """Decode the members (suffix -> content, and `__key__`) of one sample. Raises BadSample."""
    image = next((decode_image(members[s], max_megapixels) for s in IMAGE_SUFFIXES if s in members), None)
    caption = _decode_caption(members)
    if image is None and caption is None:
        raise BadSample("neither image nor caption")
    return RawSample(str(members["__key__"]), image, caption)


def decode_image(content: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Decode a JPEG, PNG or WebP file to mode RGB, upright, transparency on white. Raises BadSample."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
            if image.width * image.height > max_megapixels * 1e6:
                raise BadSample("oversized image")
            return to_rgb(ImageOps.exif_transpose(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise BadSample("oversized image") from None
        except BadSample:
            raise
        except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ... on broken files
            raise BadSample("undecodable image") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB, transparency laid on white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def encode_png(image: Image.Image, size: int) -> bytes:
    """A PNG of size x size pixels; an image that is not square gets white margins."""
    square = ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color="white")
    out = io.BytesIO()
    square.save(out, "PNG")
    return out.getvalue()


def _decode_caption(members: Mapping[str, bytes]) -> str | None:
    try:
        if "txt" in members:
            return members["txt"].decode().strip() or None
        record = json.loads(members.get("json", b"{}"))
    except ValueError:  # not UTF-8, or not JSON
        raise BadSample("undecodable caption") from None
    captions = [record[name] for name in CAPTION_FIELDS if name in record] if isinstance(record, dict) else []
    return next((text.strip() for text in captions if isinstance(text, str) and text.strip()), None)
