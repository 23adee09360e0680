"""Grouping of a tar's members into samples by WebDataset's rule.

A member's key is its path up to the first dot of the file name. A file whose name begins with a dot (`._a.jpg`) has no
key. The members with the same key form a sample. They must follow each other in the tar. Otherwise the sample would be
read as several samples, so the tar is refused. It is also refused if two keys differ only in a leading `./` or in their
Unicode form (NFC or NFD).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from webdataset.tariterators import base_plus_ext

from moe_dist.core.errors import UserError

NO_KEY = "members without key and ending"


@dataclass(frozen=True, slots=True)
class SampleFiles:
    """The key of one sample, and a dict from the ending of each of its members to the member's content.

    An ending is the part of the file name after its first dot, in lower case. The content of a link or device is None.
    """

    key: str
    files: dict[str, bytes | None] = field(default_factory=dict)


def sample_groups(
    entries: Iterable[tuple[str, bytes | None]], shard: str, unused: Counter[str] | None = None
) -> Iterator[SampleFiles]:
    """Group the members of a tar, given as (name, content), into samples.

    Raises UserError if the members of a sample do not follow each other, if two of them have the same ending, or if two
    keys are one name in two spellings.

    shard: the name of the tar, for error messages.
    unused: a counter for members that belong to no sample because their name has no key or no ending.
    """
    seen: dict[str, str] = {}  # _spelt(key) -> key
    sample: SampleFiles | None = None
    for name, content in entries:
        key, suffix = base_plus_ext(name)
        if key is None or key.endswith("/"):  # webdataset gives d/.a the key d/
            if unused is not None:
                unused[NO_KEY] += 1
            continue
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            _check_new(key, seen, shard)
            seen[_spelt(key)] = key
            sample = SampleFiles(key)
        if suffix.lower() in sample.files:
            raise UserError(
                f"shard {shard}: the sample '{key}' has two members .{suffix.lower()}; leave one of them out"
            )
        sample.files[suffix.lower()] = content
    if sample is not None:
        yield sample


def _check_new(key: str, seen: Mapping[str, str], shard: str) -> None:
    """Raise UserError if the key of a new sample is in `seen`, in the same spelling or in another one."""
    other = seen.get(_spelt(key))
    if other == key:
        raise UserError(
            f"shard {shard}: the key '{key}' comes back after other samples, but the members of a sample must "
            "stand together; write the tar again with `tar --sort=name`"
        )
    if other is not None:
        raise UserError(
            f"shard {shard}: the keys {other!a} and {key!a} are one name in two spellings, and each would be a sample; "
            "rename the members of one of them"
        )


def _spelt(key: str) -> str:
    """Return a key in Unicode form NFC and without a leading `./`.

    If two keys have the same result, they are spellings of the same name.
    """
    return unicodedata.normalize("NFC", key).removeprefix("./")
