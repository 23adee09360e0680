"""Counts of a shard's samples: how many are bad, how many have a lost part, and which parts are unused by design.

A table in docs/data.md defines these terms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moe_dist.core.errors import UserError

KEYS_SHOWN = 3
REASONS_KEPT = 100  # later reasons and names are counted as one
OTHERS = "of other kinds"
IMAGE_LOSS, CAPTION_LOSS = ("image ",), ("caption ", "json ")  # beginnings of the reasons


class Loss(NamedTuple):
    """A part of a sample that was lost: the reason why, and the sample's key.

    A part is lost if it cannot be used, for example because the image format is not supported. A part that is unused by
    design is not lost.
    """

    reason: str
    key: str


@dataclass(slots=True)
class SampleReport:
    """The number of samples read, the number of bad samples, and the number of samples with a lost part.

    Bad samples, and samples with a lost part, are counted by reason. Each sample is counted for at most one reason. To
    add up the reports of several shards, use merge().
    """

    total: int = 0
    other_splits: int = 0  # samples of other splits in the same shards
    bad: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)  # members and json fields unused by design: name -> samples
    first_keys: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few keys

    @property
    def used(self) -> int:
        """Return the number of samples that are not bad and have no lost part."""
        return self.total - self.bad.total() - self.lost.total()

    def add_bad(self, reason: str, key: str) -> None:
        self._add(self.bad, reason, key)

    def add_lost(self, loss: Loss) -> None:
        self._add(self.lost, *loss)

    def _add(self, counts: Counter[str], reason: str, key: str) -> None:
        reason = _bounded(counts, reason)
        counts[reason] += 1
        keys = self.first_keys.setdefault(reason, [])
        if len(keys) < KEYS_SHOWN:
            keys.append(key)

    def add_unused(self, names: Iterable[str]) -> None:
        for name in names:
            self.unused[_bounded(self.unused, name)] += 1

    def to_json(self) -> dict[str, Any]:
        counts = {"bad": dict(self.bad), "lost": dict(self.lost), "unused": dict(self.unused)}
        return {"total": self.total, "other_splits": self.other_splits, **counts, "first_keys": self.first_keys}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> SampleReport:
        """Restore a report from `stored`, the dict that to_json() returned."""
        bad, lost, unused = (Counter(stored[name]) for name in ("bad", "lost", "unused"))
        return cls(stored["total"], stored["other_splits"], bad, lost, unused, stored["first_keys"])

    def merge(self, other: SampleReport) -> None:
        """Add the counts of another report to this one."""
        self.total += other.total
        self.other_splits += other.other_splits
        for mine, others in ((self.bad, other.bad), (self.lost, other.lost), (self.unused, other.unused)):
            for name, number in others.items():
                mine[_bounded(mine, name)] += number
        for reason, keys in other.first_keys.items():
            self.first_keys[reason] = (self.first_keys.get(reason, []) + keys)[:KEYS_SHOWN]

    def summary(self) -> str:
        """Return one line such as `3 of 200 samples skipped: 2 undecodable image (a, b), 1 oversized image (c)`."""
        line = f"{self.bad.total()} of {self.total} samples skipped{self._reasons(self.bad)}"
        if self.lost:
            line += f"; {self.lost.total()} of {self.total} lost a part{self._reasons(self.lost)}"
        return line

    def _reasons(self, counts: Counter[str]) -> str:
        reasons = [f"{n} {reason} ({', '.join(self.first_keys.get(reason, []))})" for reason, n in counts.most_common()]
        return f": {', '.join(reasons)}" if reasons else ""

    def check_samples(self, split: str) -> None:
        """Raise UserError if the report counts no samples. split: the name of the split, for the error message."""
        if self.total == 0 and self.other_splits == 0:
            raise UserError(f"the shards of the {split} split hold no samples")
        if self.total == 0:
            raise UserError(
                f"none of the {self.other_splits} samples in the shards belongs to the {split} split: the hash of "
                "their keys or prompts holds out data.validation_fraction for validation and 5 % for test; set "
                "data.validation_shards to other shards (for a first try, to the same ones), or add samples"
            )

    def check(self, max_bad_fraction: float, unwanted: tuple[str, ...] = ()) -> None:
        """Raise UserError if more than max_bad_fraction of the samples are bad or have a lost part.

        unwanted: prefixes of the reasons for lost parts that the recipe does not use. A sample is not counted if the
        reason for its lost part has one of these prefixes.
        """
        lost = sum(number for reason, number in self.lost.items() if not reason.startswith(unwanted))
        if exceeds(self.bad.total() + lost, max_bad_fraction, self.total):
            raise UserError(f"{self.summary()}; data.max_bad_fraction={max_bad_fraction} allows fewer")


def readable(name: str) -> str:
    """Return a name in a form that can be printed and stored: bytes that are not UTF-8 are written like \\xe9."""
    try:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return name.encode(errors="backslashreplace").decode()


def exceeds(number: int, fraction: float, total: int) -> bool:
    """Return whether `number` is more than `fraction` of `total`. For example, 29 of 100 does not exceed 0.29."""
    return number > 0 and number / total > fraction  # 0.29 * 100 is less than 29


def _bounded(counts: Counter[str], name: str) -> str:
    return name if name in counts or len(counts) < REASONS_KEPT else OTHERS
