"""JSONL shards: a .jsonl or .jsonl.gz file, of which each line becomes a sample with a .json member.

Empty lines are skipped. A line that is not a JSON object makes the file unusable, as a damaged header does with a tar:
UserError names the line.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from moe_dist.core.errors import UserError
from moe_dist.data.shards.sample_groups import SampleFiles

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
GZIP_MAGIC = b"\x1f\x8b"
GZIP_WINDOW = 31  # zlib's way to say: a gzip header and the largest window
READ_BYTES = 1 << 20  # bytes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def is_jsonl(shard: str) -> bool:
    """Return whether a shard's path or URL names a JSONL file."""
    return shard.endswith(JSONL_SUFFIXES)


def jsonl_samples(stream: BinaryIO, shard: str) -> Iterator[SampleFiles]:
    """Yield a sample for each line of a plain or compressed JSONL file. Its key is the file's name and the line number.

    Raises UserError naming the line if it is not a JSON object, and EOFError or ValueError if the compression is
    damaged.
    """
    name = shard.rpartition("/")[2]
    for number, line in enumerate(_lines(stream), 1):
        if line := line.removeprefix(BYTE_ORDER_MARK if number == 1 else b"").strip():
            if reason := _fault(line):
                raise UserError(f"shard {shard}: line {number} {reason}; mend the line or leave it out")
            yield SampleFiles(f"{name} line {number}", {"json": line})


def _fault(line: bytes) -> str | None:
    """Return why a line is not a JSON object, or None if it is one."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return "is not UTF-8"
    except json.JSONDecodeError as error:
        return f"is not valid JSON ({error.msg} at character {error.pos + 1})"
    except (ValueError, RecursionError):  # a number of thousands of digits, or nested too deeply
        return "is not valid JSON"
    return None if isinstance(record, dict) else "is no JSON object"


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    rest: list[bytes] = []  # of the line that has not ended yet
    for chunk in _unpacked(stream):
        first, *lines = chunk.split(b"\n")
        rest.append(first)
        for line in lines:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)


def _unpacked(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the content of a stream, decompressed if it is one or several gzip members."""
    chunk = stream.read(READ_BYTES)
    if not chunk.startswith(GZIP_MAGIC):
        while chunk:
            yield chunk
            chunk = stream.read(READ_BYTES)
        return
    try:
        unpacker = zlib.decompressobj(GZIP_WINDOW)
        while chunk:
            yield unpacker.decompress(chunk)
            chunk = unpacker.unused_data or stream.read(READ_BYTES)
            if unpacker.eof and chunk:
                unpacker = zlib.decompressobj(GZIP_WINDOW)
    except zlib.error as error:
        raise ValueError(f"damaged gzip data ({error})") from None
    if not unpacker.eof:
        raise EOFError("gzip data end too early")
