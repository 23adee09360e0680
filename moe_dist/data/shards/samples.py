"""Decoding of a shard's raw samples, and a report of those that could not be decoded.

A decoded sample is an RGB image, a caption or both, or an instruction with or without an image. A raw sample is the
group of a tar's members that share a key: `.jpg`, `.jpeg`, `.png` or `.webp` for the image, `.txt` for the caption, or
`.json` with the field `caption` or `text`, else with `prompt` and `answer` (data/tasks/instructions.py). Other members
are ignored.
"""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageOps

from moe_dist.core.errors import UserError
from moe_dist.data.tasks.instructions import Instruction, is_instruction, read_instruction, sample_hash

MAX_MEGAPIXELS = 64.0  # checked in the header, so that a larger image (a decompression bomb) is never decoded
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_FIELDS = ("caption", "text")
KEYS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class RawSample:
    """A decoded sample: an image, a caption, or both; or an instruction with or without an image."""

    key: str
    image: Image.Image | None  # mode RGB, original size
    caption: str | None
    instruction: Instruction | None = None
    hash: int = 0  # sample_hash if this is an instruction, else 0

    @property
    def text(self) -> str | None:
        """Return the text that a text tokenizer will encode: the instruction's prompt and answer, or the caption."""
        return self.instruction.prompt + self.instruction.answer if self.instruction else self.caption


class BadSample(Exception):
    """A sample that cannot be used. The message is the reason in two or three words, under which it is counted."""


@dataclass(slots=True)
class SampleReport:
    """Number of samples read and skipped, by reason. merge() adds up the reports of several shards."""

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
        """Return one line such as `3 of 200 samples skipped: 2 undecodable image (a, b), 1 oversized image (c)`."""
        reasons = [f"{n} {reason} ({', '.join(self.first_keys[reason])})" for reason, n in self.bad.most_common()]
        return f"{self.bad.total()} of {self.total} samples skipped" + (f": {', '.join(reasons)}" if reasons else "")

    def check(self, max_bad_fraction: float) -> None:
        """Raise UserError if more than this fraction of the samples was skipped, or if there were no samples."""
        if self.total == 0:
            raise UserError("the shards hold no samples of this split")
        if self.bad.total() > max_bad_fraction * self.total:
            raise UserError(f"{self.summary()}; data.max_bad_fraction={max_bad_fraction} allows fewer")


def readable(key: str) -> str:
    """Return a key that can be printed and stored: a byte of its name that is not UTF-8 is written as \\xe9."""
    return key.encode(errors="surrogateescape").decode(errors="backslashreplace")


def decode_sample(members: Mapping[str, bytes], *, max_megapixels: float = MAX_MEGAPIXELS) -> RawSample:
    """Decode one sample. members: suffix -> content, plus `__key__` and `__url__`.

    Raises BadSample if the sample cannot be used. Raises UserError naming shard and sample for a malformed instruction.
    """
    key, file = str(members["__key__"]), next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
    image = None if file is None else decode_image(file, max_megapixels)
    record = _decode_json(members) if "txt" not in members else {}
    caption = _decode_caption(members, record)
    if caption is None and is_instruction(record):
        record = {name: record[name] for name in Instruction.model_fields if name in record}
        _check_unicode(json.dumps(record, ensure_ascii=False))
        instruction = read_instruction(record, f"shard {members['__url__']!s}, sample '{key}'")
        return RawSample(key, image, None, instruction, sample_hash(instruction.prompt, file or b""))
    if image is None and caption is None:
        raise BadSample("neither image nor caption")
    return RawSample(key, image, caption)


def decode_image(content: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Decode a JPEG, PNG or WebP file to mode RGB, upright, with transparency on white. Raises BadSample."""
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
    """Convert an image to mode RGB, with transparency on white and 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def encode_png(image: Image.Image, size: int) -> bytes:
    """Encode an image as a PNG of size x size pixels; add white margins if it is not square."""
    square = ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color="white")
    out = io.BytesIO()
    square.save(out, "PNG")
    return out.getvalue()


def _decode_json(members: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        record = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deeply
        raise BadSample("undecodable caption") from None
    return record if isinstance(record, dict) else {}


def _decode_caption(members: Mapping[str, bytes], record: Mapping[str, Any]) -> str | None:
    if "txt" in members:
        try:
            return _text(members["txt"].decode()) or None
        except ValueError:
            raise BadSample("undecodable caption") from None
    captions = [record[name] for name in CAPTION_FIELDS if name in record]
    return next((_text(text) for text in captions if isinstance(text, str) and _text(text)), None)


def _text(caption: str) -> str:
    """Return a caption without blanks around it and without a byte-order mark. Raises BadSample, see _check_unicode."""
    _check_unicode(caption)
    return caption.removeprefix("\ufeff").strip()


def _check_unicode(text: str) -> None:
    """Raise BadSample if a text holds a lone surrogate, which JSON can spell (\\ud83d) and no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample("text with a lone surrogate") from None
