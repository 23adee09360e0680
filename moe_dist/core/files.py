"""Files and folders that appear complete or not at all, and JSON. Imports no torch.

A file or folder is written beside its place, as NAME.tmp, and renamed once the disk has it: a reader never sees half
of it, and a crash leaves what was there before. What a killed writer leaves is overwritten by the next one. Where
several processes may write the same thing at once, each writes to a hidden .NAME.HOST.PID.tmp of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.core.errors import UserError

PARTIAL = ".tmp"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A written file, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


def partial_path(path: Path, *, shared: bool = False) -> Path:
    """Return where `path` is written before it is complete. shared: other processes may be writing it, too."""
    if shared:
        return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")
    return path.with_name(path.name + PARTIAL)


@contextmanager
def new_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield the path of a file to write; when the block ends, it replaces `path`. Raises OSError."""
    partial = partial_path(path, shared=shared)
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Replace a file by one of this content (text is UTF-8). Raises OSError."""
    with new_file(path, shared=shared) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends, it becomes `path`. Raises OSError.

    `path` must not exist by then, or be an empty folder.
    """
    partial = partial_path(path, shared=shared)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for inner in partial.rglob("*"):
            _sync(inner)
        put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a complete file, or a folder whose files are on the disk, and return when the disk has it. Raises OSError.

    An existing file, or an empty folder, is replaced.
    """
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read the mapping in a JSON file. Raises UserError naming it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise UserError(f"{path} is missing or is not JSON") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON mapping")
    return content


def write_json(path: Path, value: Any) -> StoredFile:
    """Write and fsync a JSON file of a folder that is not complete yet. Raises OSError."""
    data = json_text(value).encode()
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return StoredFile(path.name, len(data), hashlib.sha256(data).hexdigest())


def json_text(value: Any) -> str:
    """Format a value as the JSON files of this project are."""
    return json.dumps(value, indent=1) + "\n"


def _sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
