"""Reading a tar, plain or compressed, from a stream so that damage is an error.

Python's tarfile (hence webdataset) takes a damaged header, or a file that stops between two members, for the end of
the archive. Here only the end-of-archive marker is the end.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Self

DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError)  # ValueError: webdataset's, two members of the same name


def explain(error: BaseException) -> str:
    """The message of one of DAMAGE; webdataset appends streams and URLs to an exception's arguments."""
    return str(error) if isinstance(error, OSError) or not error.args else str(error.args[0])


class _StrictTarInfo(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed does not know it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or truncated tar at byte {tar.offset} ({error})") from None


def tar_members(stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each regular file. Raises one of DAMAGE if the tar is damaged."""
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as tar:
        for member in tar:
            if member.isreg():
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if len(content) != member.size:
                    raise tarfile.ReadError(f"truncated tar: {member.name} has {len(content)} of {member.size} bytes")
                yield member.name, content
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
    while stream.read(1 << 20):  # let a pipe's writer finish
        pass
