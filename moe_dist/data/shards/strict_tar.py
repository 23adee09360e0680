"""Strict reading of a tar, plain or compressed, from a stream: damage raises an error.

Python's tarfile (hence webdataset) treats a damaged header, or a file truncated between two members, as the end of the
archive. This reader accepts only the end-of-archive marker.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Self

DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError)  # ValueError: webdataset's, for a duplicate member


def explain(error: BaseException) -> str:
    """Return the message of one of the DAMAGE errors, without the streams and URLs that webdataset appends to it."""
    return str(error) if isinstance(error, OSError) or not error.args else str(error.args[0])


class _StrictTarInfo(tarfile.TarInfo):
    """A tar member whose damaged header raises ReadError instead of ending the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # missing in typeshed
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or truncated tar at byte {tar.offset} ({error})") from None


def tar_members(stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each regular file in a tar. Raises one of DAMAGE if the tar is damaged.

    The bytes of a name that is not UTF-8 are kept as Python's surrogate escapes, whatever the locale.
    """
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo, encoding="utf-8") as tar:
        for member in tar:
            if member.isreg():
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if len(content) != member.size:
                    raise tarfile.ReadError(f"truncated tar: {member.name} has {len(content)} of {member.size} bytes")
                yield member.name, content
            tar.members.clear()  # type: ignore[attr-defined]  # or tarfile would keep every header in memory
    while stream.read(1 << 20):  # let a pipe's writer finish
        pass
