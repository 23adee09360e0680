"""Atomic writing of files and folders, and reading and writing of JSON. Does not import torch.

A file or folder is written as NAME.tmp next to its final path, synced to the disk and renamed. Readers therefore never
see an incomplete file or folder. If the writer crashes, the previous version stays in place, and the next writer
overwrites the leftover NAME.tmp. If several processes may write the same file or folder at once, each writes its own
hidden .NAME.HOST.PID.tmp.
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
    """The name, size in bytes and SHA-256 of a written file."""

    name: str
    size: int
    sha256: str


def partial_path(path: Path, *, shared: bool = False) -> Path:
    """Return the temporary path at which a new version of `path` is written.

    shared: True if other processes may write `path` at the same time. Each process then has its own temporary path.
    """
    if shared:
        return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")
    return path.with_name(path.name + PARTIAL)


@contextmanager
def new_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary file to write. When the `with` block ends, this file replaces `path`.

    Raises OSError if the file cannot be moved to `path`. If the block raises, the temporary file is deleted and `path`
    stays as it was.
    """
    partial = partial_path(path, shared=shared)
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Write a file atomically. An existing file is replaced. Text is encoded as UTF-8.

    Raises OSError if the file cannot be written.
    """
    with new_file(path, shared=shared) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder to fill. When the `with` block ends, this folder is renamed to `path`.

    Raises OSError if `path` is a file or a non-empty folder, or if the new folder cannot be written. If the block
    raises, the temporary folder is deleted and `path` stays as it was.
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
    """Sync a complete file or folder to the disk, and rename it to its final path.

    The files in a folder must be synced already. An existing file or an empty folder at the final path is replaced.
    Raises OSError if the sync or the rename fails.
    """
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises UserError if the file is missing, is unreadable or holds no JSON mapping. The message names the file.
    """
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
    """Write and fsync a JSON file. Raises OSError if it cannot be written.

    The write is not atomic: use it inside a temporary folder (`new_folder`).
    """
    data = json_text(value).encode()
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return StoredFile(path.name, len(data), hashlib.sha256(data).hexdigest())


def json_text(value: Any) -> str:
    """Format a value as the text of a JSON file, in the layout that all JSON files of this project use."""
    return json.dumps(value, indent=1) + "\n"


def _sync(path: Path) -> None:
    """Write a file's content, or a directory's entries, from the system's cache to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
