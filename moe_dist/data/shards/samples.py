"""Decoding of samples from the members of a tar.

The members of a sample are files with the same key: an image (whose ending is in IMAGE_SUFFIXES), a `.txt` file and a
`.json` file. Not all of them need to be present. The caption is the content of the `.txt` file. If this file is missing
or empty, the caption is the field `caption` or `text` of the `.json` file. A `.json` file without a caption can be an
instruction, in one of the forms of data/tasks/records.py. A record with messages, conversations or Alpaca's fields is
an instruction even if it has a field `text` too.

A decoded sample has an RGB image, a caption, or both. An instruction has no caption, and its image is optional. A table
in docs/data.md shows which parts are used, unused by design or lost, and which samples are bad.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from PIL import Image, ImageOps, PngImagePlugin

from moe_dist.data.shards.lost_parts import AVIF, IMAGE_SUFFIXES, lost_json, lost_members
from moe_dist.data.shards.sample_groups import SampleFiles
from moe_dist.data.shards.sample_report import Loss, readable
from moe_dist.data.tasks.instructions import Instruction, sample_hash
from moe_dist.data.tasks.records import FORM_FIELDS, BadRecord, form_of, to_instruction

MAX_MEGAPIXELS = 64.0  # checked in the header, so that a larger image (a decompression bomb) is never decoded
# The largest compressed text or colour profile of a PNG, in bytes. Pillow's own limit is 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if AVIF else []))
CAPTION_FIELDS = ("caption", "text")


@dataclass(frozen=True, slots=True)
class RawSample:
    """A decoded sample that is not tokenised yet.

    It has an image, captions, or both. Alternatively, it is an instruction with or without an image.
    """

    key: str
    image: Image.Image | None  # mode RGB, original size
    captions: tuple[str, ...]  # several if the .json member has a list; every epoch uses one of them
    instruction: Instruction | None = None
    hash: int = 0  # sample_hash if this is an instruction, else 0
    loss: Loss | None = None  # the first lost part
    unused: tuple[str, ...] = ()  # names of members and fields that are unused by design

    @property
    def caption(self) -> str | None:
        """Return the first caption, or None if there is no caption."""
        return next(iter(self.captions), None)

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the texts for the text tokenizer: those of an instruction, or else the captions."""
        return self.instruction.texts if self.instruction else self.captions


class BadSample(Exception):
    """Raised for a sample that cannot be used, for example because its image is damaged.

    The message is the reason, in a few words. Bad samples are counted by reason.
    """


class LostSample(Exception):
    """Raised for a sample that cannot be used because of a lost part, such as the image of an instruction."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.reason)
        self.loss = loss


def decode_sample(sample: SampleFiles, shard: str, *, max_megapixels: float = MAX_MEGAPIXELS) -> RawSample:
    """Decode one sample.

    If parts of the sample are lost, the result's field `loss` describes the first of them. The field `unused` names the
    parts that are unused by design.

    If the sample cannot be used because of a lost part, raises LostSample. If it cannot be used for another reason,
    raises BadSample. If it is a malformed instruction, raises UserError naming the shard and the sample.
    """
    key, files = sample.key, sample.files
    picture = next((suffix for suffix in IMAGE_SUFFIXES if files.get(suffix) is not None), None)
    file = None if picture is None else files[picture]
    image = None if file is None else decode_image(file, max_megapixels)
    captions, name = _text_caption(files), None
    record = _read_json(files, needed=not captions)
    form = None if captions else form_of(record or {})
    if not captions and form in (None, "prompt"):
        name, captions = _json_captions(record or {})
    asks = form is not None and not captions
    lost = lost_members(files, picture, has_text=bool(captions) or asks)
    loss = next((Loss(reason, f"{key}.{end}" if "." in end else key) for end, reason in lost.items()), None)
    lacks = None if captions or asks else lost_json(record, key)
    if image is not None:
        loss = loss or lacks
    if image is None and (loss is not None if asks else not captions):
        raise LostSample(loss) if loss else BadSample(lacks.reason if lacks else "neither image nor caption")
    fields = FORM_FIELDS[form] if form is not None and asks else {name}
    unused = (*_unused_members(files, picture, lost), *_unused_fields(record or {}, fields, len(captions)))
    if record is None and captions:  # broken, or no object
        unused = (*unused, ".json")
    if not asks:
        return RawSample(key, image, captions, loss=loss, unused=unused)
    instruction = _instruction({k: v for k, v in (record or {}).items() if k in fields}, shard, key)
    if instruction.picture and image is None:
        raise LostSample(Loss("image that the record names is no member of the sample", key))
    return RawSample(key, image, (), instruction, sample_hash(instruction.prompt, file or b""), loss, unused)


def _instruction(record: Mapping[str, object], shard: str, key: str) -> Instruction:
    """Convert a JSON record to an instruction.

    Raises BadSample if the record cannot be learned from, or if its text has a lone surrogate or a null character.
    Raises UserError naming the shard and the sample if a field is missing or has a wrong type.
    """
    _check_unicode(json.dumps(record, ensure_ascii=False))
    try:
        instruction = to_instruction(record, f"shard {shard}, sample '{key}'")
    except BadRecord as reason:
        raise BadSample(str(reason)) from None
    _check_unicode("".join([*instruction.texts, *(instruction.options or ())]))
    return instruction


def decode_image(content: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Decode the first frame of an image file to an upright RGB image on a white background.

    Raises BadSample if the image is oversized, cannot be decoded or has 32-bit values, or if the text or the colour
    profile of a PNG is too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            if image.width * image.height > max_megapixels * 1e6:
                raise BadSample("oversized image")
            if image.format == "TIFF" and image.mode in ("I", "F"):  # their range is unknown
                raise BadSample("image of 32-bit values")
            return to_rgb(ImageOps.exif_transpose(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise BadSample("oversized image") from None
        except BadSample:
            raise
        except Exception as error:  # on broken files: OSError, SyntaxError, ValueError, struct.error, ...
            too_long = "MAX_TEXT_" in str(error)  # Pillow names the limit in its messages
            reason = "PNG text or colour profile above 16 MiB" if too_long else "undecodable image"
            raise BadSample(reason) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to mode RGB. Transparent images get a white background. 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def encode_png(image: Image.Image, size: int) -> bytes:
    """Encode an image as a PNG of size x size pixels, adding white margins if the image is not square."""
    square = ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color="white")
    out = io.BytesIO()
    square.save(out, "PNG")
    return out.getvalue()


def _text_caption(files: Mapping[str, bytes | None]) -> tuple[str, ...]:
    try:
        text = _text((files.get("txt") or b"").decode())
    except ValueError:
        raise BadSample("undecodable caption") from None
    return (text,) if text else ()


def _read_json(files: Mapping[str, bytes | None], *, needed: bool) -> dict[str, object] | None:
    """Return the JSON object in the .json member, or {} if there is no such member.

    If the member contains a JSON value that is not an object, return None. If the member is not valid JSON, raise
    BadSample if `needed` is true, and return None otherwise.
    """
    content = files.get("json")
    if content is None:
        return {}
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deeply
        if needed:
            raise BadSample("undecodable caption") from None
        return None
    return record if isinstance(record, dict) else None


def _json_captions(record: Mapping[str, object]) -> tuple[str | None, tuple[str, ...]]:
    """Find the captions in the JSON object of a .json member.

    Return the name of the field that holds them, and the captions themselves. If there are none, return (None, ()).
    """
    fields = [(name, record[name]) for name in CAPTION_FIELDS if name in record]
    for name, value in sorted(fields, key=lambda item: isinstance(item[1], list)):  # a list, if there is no other
        texts = [_text(text) for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        captions = tuple(text for text in texts if text)
        if captions:
            return name, captions
    return None, ()


def _text(caption: str) -> str:
    """Return a caption without its byte-order mark and surrounding whitespace.

    Raises BadSample if the caption has a lone surrogate or a null character.
    """
    _check_unicode(caption)
    return caption.removeprefix("\ufeff").strip()


def _check_unicode(text: str) -> None:
    """Raise BadSample if a text has a lone surrogate or a null character.

    JSON can express a lone surrogate (\\ud83d), but no tokenizer can encode it. Null characters are a sign of UTF-16.
    """
    if "\0" in text:
        raise BadSample("text with a null character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample("text with a lone surrogate") from None


def _unused_members(files: Mapping[str, bytes | None], picture: str | None, lost: Mapping[str, str]) -> Iterator[str]:
    return (f".{suffix}" for suffix in files if suffix not in (picture, "txt", "json") and suffix not in lost)


def _unused_fields(record: Mapping[str, object], used: Iterable[str | None], captions: int) -> Iterator[str]:
    """Yield a description of each JSON field that is not read, and of each caption list that has entries without text.

    used: the names of the fields that are read.
    captions: the number of the sample's captions.
    """
    for name, value in record.items():
        if name not in used:
            yield readable(f"json field {name}")
        elif isinstance(value, list) and name in CAPTION_FIELDS and len(value) > captions:
            yield f"entries without text in json field {name}"
