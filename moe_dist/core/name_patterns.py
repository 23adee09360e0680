"""Patterns over parameter names. `*` stands for any text, dots included; every other character stands for itself."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache

from moe_dist.core.errors import UserError, closest


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """To be matched with whole names; each `*` is a group, as short as it can be, from the left."""
    return re.compile("(.*?)".join(re.escape(part) for part in pattern.split("*")))


def matching(patterns: Iterable[str], names: Collection[str], *, key: str, what: str) -> set[str]:
    """The names that match any of the patterns.

    Raises UserError naming a pattern that matches nothing; `key` is the recipe's, `what` the kind of the names.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if compiled(pattern).fullmatch(name)}
        if not matched:
            close = closest(pattern, names)
            hint = f" (the closest is '{close}')" if close else ""
            raise UserError(f"{key}: '{pattern}' matches no {what}{hint}")
        found |= matched
    return found


def carried_over(pattern: str, name: str, other: str) -> str:
    """`other` with each `*` replaced by what the same `*` of `pattern` stands for in `name`, which matches it."""
    match = compiled(pattern).fullmatch(name)
    assert match is not None
    first, *rest = other.split("*")
    return first + "".join(f"{text}{part}" for text, part in zip(match.groups(), rest, strict=True))
