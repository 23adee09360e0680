"""Full and read-only disks, mounted for real if this process may mount.

If it may not, a limit on the size of files simulates a full disk, and a folder without write permission a read-only
one.
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
    """A small file system, or a simulated one (not `mounted`)."""

    folder: Path
    mounted: bool

    def room(self) -> int:
        """Number of bytes that are free."""
        return shutil.disk_usage(self.folder).free

    def fill(self, room: int) -> None:
        """Leave `room` bytes free until the disk is emptied (on a real disk: rounded down to whole pages)."""
        if self.mounted:
            with (self.folder / "ballast").open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, max(self.room() - room, 1))

    def grow(self) -> None:
        """Make enough room for everything."""
        if self.mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(self.folder)], check=True)

    def empty(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    @contextmanager
    def limit(self, room: int) -> Iterator[None]:
        """Limit the size of files if the disk is simulated. Every rank that writes while the disk is full must call
        this.
        """
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
    """Turn `folder` into a tmpfs of `size` bytes."""
    folder.mkdir(parents=True)
    mounted = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield Disk(folder, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[Disk]:
    """Make `folder` read-only: for everybody if it can be mounted so, otherwise for processes that are `restricted`."""
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
    """Let a read-only folder stop writes of this process, even if nothing could be mounted and even if it is root."""
    with nullcontext() if disk.mounted else unprivileged():
        yield


def _mount(*arguments: str) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
