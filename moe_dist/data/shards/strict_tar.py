"""Strict reading of a plain or compressed tar from a stream. A damaged tar raises an error.

Python's tarfile (and therefore webdataset) treats a damaged header, or a file truncated between two members, as the end
of the archive. This reader requires an end-of-archive marker that is followed by nothing but zeros.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, Self

DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error)
AFTER_END = (
    "bytes follow its end-of-archive marker, as `cat a.tar b.tar` writes them, and would be lost; join tars with "
    "`tar --concatenate --file=a.tar b.tar`"
)
GZIP_MAGIC = b"\x1f\x8b"


def explain(error: BaseException) -> str:
    """Return the message of an exception raised by tar_entries(). DAMAGE lists the possible exception types."""
    return str(error) if isinstance(error, OSError) or not error.args else str(error.args[0])


class _StrictTarInfo(tarfile.TarInfo):
    """The header of a tar member.

    A damaged header raises ReadError. Python's tarfile would treat it as the end of the archive.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # missing in typeshed
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or truncated tar at byte {tar.offset} ({error})") from None


def tar_members(stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) for each regular file in a tar.

    Raises an exception of one of the types in DAMAGE if the tar is damaged.
    """
    return ((name, content) for name, content in tar_entries(stream) if content is not None)


def tar_entries(stream: BinaryIO) -> Iterator[tuple[str, bytes | None]]:
    """Yield (name, content) for each member that is not a folder. The content of a link or device is None.

    Raises an exception of one of the types in DAMAGE if the tar is damaged. Names are decoded as UTF-8 in every locale.
    Bytes that are not UTF-8 become surrogate escapes, as in Python's file names.
    """
    whole = unzipped(stream)
    mode: Literal["r|", "r|*"] = "r|" if isinstance(whole, gzip.GzipFile) else "r|*"
    with tarfile.open(fileobj=whole, mode=mode, tarinfo=_StrictTarInfo, encoding="utf-8") as tar:
        for member in tar:
            if member.isreg():
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if len(content) != member.size:
                    raise tarfile.ReadError(f"truncated tar: {member.name} has {len(content)} of {member.size} bytes")
                yield member.name, content
            elif not member.isdir():
                yield member.name, None
            tar.members.clear()  # type: ignore[attr-defined]  # or tarfile would keep every header in memory
        _check_end(tar.fileobj)
    while stream.read(1 << 20):  # let a pipe's writer finish
        pass


def _check_end(unpacked) -> None:
    """Raise ReadError unless only zeros follow the end-of-archive marker.

    unpacked: the stream from which tarfile has read the uncompressed tar.
    """
    while chunk := unpacked.read(1 << 20):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(AFTER_END)
    # tarfile reads the first of several bz2 or xz streams; what follows it is left over in the decompressor.
    if getattr(getattr(unpacked, "cmp", None), "unused_data", b"").strip(b"\0"):
        raise tarfile.ReadError(AFTER_END)


class _Rejoined(io.RawIOBase):
    """A stream that returns `head` first, and then the bytes of `rest`."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        part = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(part) :]
        buffer[: len(part)] = part
        return len(part)


def unzipped(stream: BinaryIO) -> BinaryIO:
    """Return the stream, decompressed if it is gzip.

    The gzip module is used because it verifies the checksum. The tarfile module can also decompress gzip, but does not
    verify the checksum.
    """
    head = stream.read(len(GZIP_MAGIC))
    whole = io.BufferedReader(_Rejoined(head, stream), 1 << 16)
    return gzip.GzipFile(fileobj=whole) if head == GZIP_MAGIC else whole  # type: ignore[return-value]
