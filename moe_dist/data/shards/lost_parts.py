"""Search for the parts of a sample that are lost: members that cannot be used, and JSON without a caption.

A table in docs/data.md shows which parts are lost, and which are unused by design.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from PIL import features

from moe_dist.data.shards.sample_report import Loss, readable

AVIF = features.check("avif")  # Pillow may be built without it
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp", "jpe", "jfif", "gif", "bmp", "tif", "tiff"),  # the first that is there is used
    *(["avif"] if AVIF else []),
)
_MORE_IMAGES = (
    "apng arw avif avifs cr2 dds dng eps exr hdr heic heif icns ico j2c j2k jp2 jpx jxl nef pbm pcx pgm pnm ppm psd "
    "qoi raw svg tga"
)
UNSUPPORTED_IMAGES = tuple(suffix for suffix in _MORE_IMAGES.split() if suffix not in IMAGE_SUFFIXES)
COMPRESSED = ("gz", "bz2", "xz", "zst")  # endings after that of an image or caption
# The first bytes of images, whatever the ending of the file's name is.
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF.{4}WEBP|II\*\0|MM\0\*|BM.{4}\0{4}|.{4}ftyp(avif|avis|heic|mif1)",
    re.DOTALL,
)
UNREAD_CAPTIONS = ("caption", "captions", "text")  # endings
FIELDS_SHOWN = 8


def lost_members(files: Mapping[str, bytes | None], picture: str | None, *, has_text: bool) -> dict[str, str]:
    """Find the members that are lost (see `Loss`). Return a dict that maps the ending of each to the reason.

    picture: the ending of the member that is used as the image, or None.
    has_text: whether the sample has a caption or is an instruction.
    """
    lost: dict[str, str] = {}
    for suffix, content in files.items():
        *dotted, last = suffix.split(".")
        packed = bool(dotted) and last in COMPRESSED
        kind = _kind(dotted[-1] if packed else last, content if picture is None else None)
        unwanted = picture is not None if kind == "image" else has_text
        if kind is None or (unwanted and (packed or not dotted)):
            continue
        if packed:
            lost[suffix] = f"{kind} member .{suffix} is compressed"
        elif dotted:
            lost[suffix] = f"{kind} member whose name has a second dot before .{last}"
        elif content is None:
            lost[suffix] = f"{kind} member is a link"
        elif kind == "image":
            lost[suffix] = f"image member .{suffix} is not supported"
        elif suffix in UNREAD_CAPTIONS:
            lost[suffix] = f"caption member .{suffix} is not read, .txt is"
    return lost


def _kind(last: str, content: bytes | None) -> str | None:
    """Return "image" or "caption" if a member is one of these, otherwise None.

    last: the last part of the member's ending, ignoring a compression suffix.
    content: if it begins like an image file, the member is an image, whatever `last` is. If None, only `last` is used.
    """
    if last in IMAGE_SUFFIXES or last in UNSUPPORTED_IMAGES or (content is not None and _SIGNATURE.match(content)):
        return "image"
    return "caption" if last in ("txt", "json", *UNREAD_CAPTIONS) else None


def lost_json(record: Mapping[str, object] | None, key: str) -> Loss | None:
    """Return the reason why a sample has no caption, as a Loss.

    If there is no .json member, or if it is an empty object, returns None, because no caption is lost.
    record: the result of _read_json(). key: the sample's key.
    """
    if record is None:
        return Loss("json has no caption, it is no object", key)
    keys = readable(", ".join(sorted(record)[:FIELDS_SHOWN])) + (", ..." if len(record) > FIELDS_SHOWN else "")
    return Loss(f"json has no caption, its keys are {keys}", key) if record else None
