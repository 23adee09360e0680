"""Random tars of samples, damage to their members and bytes, and a second reader that counts what a tar holds."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

from PIL import Image

from tests.support.fuzz_mutations import damage_bytes, damage_json

QUESTION = {
    "prompt": "Which is red?\nA. sky\nB. rose\nAnswer:",
    "answer": " B",
    "domain": "colour",
    "question": "Which is red?",
    "options": ["sky", "rose"],
    "correct": 1,
}
RECORDS = (
    {"caption": "a red rose", "width": 40, "tags": ["a", {"b": 1}]},
    {"text": ["a rose", "a red rose"], "caption": 5},
    {"prompt": "What is it?\nAnswer:", "answer": " a rose", "domain": "flowers"},
    QUESTION,
    {"id": 3, "conversations": [{"from": "human", "value": "<image>\nWhat?"}]},
)
ENDINGS = ("png", "jpg", "gif", "webp", "txt", "json", "psd", "v2.jpg", "caption", "cls", "")
KEYS = (
    "{n:05d}",
    "a b/{n}",
    "caf\u00e9{n}",
    "./x/{n}",
    "x.d/{n}",
    "{n}\udce9",
    "n" * 120 + "{n}",
    "\U0001f600{n}",
    "k{n}\n",
)
KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE, b"Z")
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
PACKINGS = {
    ".tar": (bytes, bytes),
    ".tar.gz": (gzip.compress, gzip.decompress),
    ".tgz": (gzip.compress, gzip.decompress),
}
OTHER_PACKINGS = {".tar": (bz2.compress, lzma.compress)}  # a tar that a name does not say is packed


@dataclass(frozen=True)
class Member:
    """A member of a tar to write."""

    name: str
    content: bytes = b""
    kind: bytes = tarfile.REGTYPE
    pax: tuple[tuple[str, str], ...] = ()


@cache
def picture(number: int, kind: str) -> bytes:
    """Return an image file of 8 x 8 pixels whose colour depends on `number`."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 37 % 256, number * 11 % 256, 99)).save(out, kind)
    return out.getvalue()


def draw_members(draw: Random, samples: int) -> list[Member]:
    """Draw the members of a few samples in order."""
    pattern = draw.choice(KEYS)
    members = []
    for number in range(samples):
        key = (draw.choice(KEYS) if draw.random() < 0.2 else pattern).format(n=number)
        for ending in draw.sample(ENDINGS, draw.choice((1, 2, 2, 3))):
            members.append(Member(f"{key}.{ending}" if ending else key, _content(draw, number, ending)))
    return members


def _content(draw: Random, number: int, ending: str) -> bytes:
    kinds = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "webp": "WEBP", "v2.jpg": "JPEG"}
    if ending in kinds:
        return picture(number, kinds[ending])
    if ending == "json":
        return json.dumps(draw.choice(RECORDS)).encode()
    return f"text {number} \u00e9".encode()


def damage_members(draw: Random, members: Sequence[Member]) -> list[Member]:
    """Repeat, exchange, remove, rename or change a member."""
    members = list(members)
    one, other = draw.randrange(len(members)), draw.randrange(len(members))
    member = members[one]
    key, _, ending = member.name.rpartition(".")
    kind = draw.randrange(12)
    if kind == 0:
        members.insert(other, member)
    elif kind == 1:
        members[one], members[other] = members[other], member
    elif kind == 2:
        del members[one]
    elif kind == 3:
        names = (
            f"{key}.{ending.upper()}",
            key,
            f".{ending}",
            f"{key}.{draw.choice(ENDINGS)}",
            f"{key}..{ending}",
            "/",
            "",
        )
        members[one] = replace(member, name=draw.choice(names))
    elif kind == 4:
        members[one] = replace(member, kind=draw.choice(KINDS))
    elif kind == 5:
        members[one] = replace(member, content=damage_bytes(draw, member.content or b"x"))
    elif kind == 6:
        members[one] = replace(member, content=member.content[: draw.randint(0, len(member.content))])
    elif kind == 7:
        members[one] = replace(
            member, content=draw.choice((b"", b"\xff\xfe", b"\xef\xbb\xbf", bytes(700), b"[" * 9999))
        )
    elif kind == 8:
        members[one] = replace(member, pax=draw.choice(PAX))
    elif kind == 9:
        draw.shuffle(members)
    elif kind == 10:
        members[one] = replace(member, content=damage_json(draw, draw.choice(RECORDS)))
    else:
        members.insert(one, Member(draw.choice(("README", "._a.png", "d", "d/")), b"x", draw.choice(KINDS)))
    return members


PAX = (
    (("size", "3"),),
    (("size", "-1"),),
    (("size", "x"),),
    (("path", "renamed.png"),),
    (("path", ""),),
    (("GNU.sparse.map", "0,1"), ("GNU.sparse.size", "9")),
    (("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "99999")),
    (("mtime", "never"),),
    (("comment", "x" * 2000),),
    (("hdrcharset", "BINARY"), ("path", "caf\udce9.txt")),
)


def pack(draw: Random, members: Sequence[Member]) -> bytes:
    """Write a plain tar in a random format and encoding of names."""
    out = io.BytesIO()
    encoding = draw.choice(("utf-8", "utf-8", "latin-1"))
    with tarfile.open(
        fileobj=out, mode="w", format=draw.choice(FORMATS), encoding=encoding, errors="surrogateescape"
    ) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.size, info.pax_headers = member.kind, len(member.content), dict(member.pax)
            if member.kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "first"
            try:
                tar.addfile(info, io.BytesIO(member.content))
            except (ValueError, UnicodeEncodeError):  # this format cannot spell the name
                info.name = re.sub(r"[^ -~]|/", "_", member.name)[-60:] or "_"
                tar.addfile(info, io.BytesIO(member.content))
    return out.getvalue()


def write_tar(draw: Random, folder: Path, members: Sequence[Member], damage: int) -> Path:
    """Write a plain or compressed tar whose bytes are damaged `damage` times, before or after they are compressed."""
    content = pack(draw, members)
    suffix = draw.choice((".tar", ".tar", ".tar", ".tar.gz", ".tgz"))
    compress = PACKINGS[suffix][0]
    if suffix == ".tar" and draw.random() < 0.05:
        compress = draw.choice(OTHER_PACKINGS[suffix])
    within = draw.random() < 0.7
    for _ in range(damage if within else 0):
        content = damage_bytes(draw, content)
    content = compress(content)
    for _ in range(0 if within else damage):
        content = damage_bytes(draw, content)
    path = folder / f"a{suffix}"
    path.write_bytes(content)
    return path


def write_members(path: Path, members: Sequence[Member]) -> None:
    """Write members to a sound tar."""
    path.write_bytes(pack(Random(0), members))


def headers(content: bytes) -> int | None:
    """Return the number of regular files, links and devices in a tar, wherever their headers are, or None if unknown.

    Reads on after zeros and after blocks that are not headers, as no reader of tars does.
    """
    for open_packed in (gzip.decompress, bz2.decompress, lzma.decompress, bytes):
        try:
            plain = open_packed(content)
            break
        except (OSError, EOFError, ValueError, lzma.LZMAError, Exception):
            continue
    try:
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:", ignore_zeros=True, encoding="utf-8") as tar:
            return sum(not member.isdir() for member in tar)
    except (tarfile.TarError, ValueError, OSError, EOFError):
        return None


def key_of(name: str) -> str | None:
    """Return the key of a member's name by the rule of docs/data.md, written down a second time; None without a key."""
    folder, slash, file = name.rpartition("/")
    stem, dot, _ = file.partition(".")
    return folder + slash + stem if dot and stem else None
