"""JSONL shards: .jsonl or .jsonl.gz files. Each line becomes a sample with a .json member.

Empty lines are skipped. If a line is not a JSON object, the whole file is unusable, and a UserError names the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from moe_dist.core.errors import UserError
from moe_dist.data.shards.sample_groups import SampleFiles
from moe_dist.data.shards.strict_tar import unzipped

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def is_jsonl(shard: str) -> bool:
    """Return whether a shard's path or URL names a JSONL file."""
    return shard.endswith(JSONL_SUFFIXES)


def jsonl_samples(stream: BinaryIO, shard: str) -> Iterator[SampleFiles]:
    """Yield a sample for each line of a plain or compressed JSONL file.

    The key of the sample consists of the file's name and the line number.
    Raises UserError if a line is not a JSON object. The message names the line. If the compression is damaged, raises
    an exception of one of the types in DAMAGE (strict_tar.py).
    """
    name = shard.rpartition("/")[2]
    for number, line in enumerate(unzipped(stream), 1):
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
