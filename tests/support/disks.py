"""Disks as they go wrong: full ones and read-only ones. Mounted for real where this process may mount.

Where it may not, a full disk is a limit on the size of files, and a read-only one a folder without write permission.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tests.support.permissions import unprivileged


@dataclass(frozen=True)
class Disk:
    """A small file system, or the pretence of one (not `mounted`)."""

    folder: Path
    mounted: bool

    def room(self) -> int:
        """Bytes that are free."""
        return shutil.disk_usage(self.folder).free

    def fill(self, room: int) -> None:
        """Leave `room` bytes free (on a real disk: rounded down to whole pages) until it is emptied."""
        if self.mounted:
            with (self.folder / "ballast").open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, max(self.room() - room, 1))

    def grow(self) -> None:
        """Room for everything."""
        if self.mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(self.folder)], check=True)

    def empty(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    @contextmanager
    def limit(self, room: int) -> Iterator[None]:
        """For every rank that writes while the disk is filled: where it is no real one, it lets no larger file grow."""
        if self.mounted:
            yield
            return
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (min(room, 2000), limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Disk]:
    """`folder` becomes a tmpfs of `size` bytes."""
    folder.mkdir(parents=True)
    mounted = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield Disk(folder, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[Disk]:
    """`folder` becomes read-only: for everybody where it can be mounted so, else for those who are `restricted`."""
    mounted = _mount("--bind", str(folder), str(folder))
    if mounted:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    mode = folder.stat().st_mode
    if not mounted:
        folder.chmod(0o555)
    try:
        yield Disk(folder, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        else:
            folder.chmod(mode)


@contextmanager
def restricted(disk: Disk) -> Iterator[None]:
    """Who writes here is stopped by a read-only folder even where nothing could be mounted, and even if it is root."""
    with nullcontext() if disk.mounted else unprivileged():
        yield


def _mount(*arguments: str) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
