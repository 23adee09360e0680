"""Patterns over parameter names. `*` matches any text, including dots; every other character matches itself."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache

from moe_dist.core.errors import UserError, closest


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern to a regular expression, to be used with fullmatch. Each `*` becomes a non-greedy group."""
    return re.compile("(.*?)".join(re.escape(part) for part in pattern.split("*")))


def matching(patterns: Iterable[str], names: Collection[str], *, key: str, what: str) -> set[str]:
    """Return the names that match any of the patterns. Raises UserError if a pattern matches no name.

    key: the recipe's key that holds the patterns. what: a description of the named things, such as "parameter of the
    model". Both are part of the error message.
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


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Return True if the name matches at least one of the patterns."""
    return any(compiled(pattern).fullmatch(name) for pattern in patterns)


def carried_over(pattern: str, name: str, other: str) -> str:
    """Return `other` with each `*` replaced by text from `name`, which must match `pattern`.

    The n-th `*` of `other` is replaced by the text that the n-th `*` of `pattern` matches. The result is the new name
    of a parameter that is renamed from `pattern` to `other`.
    """
    match = compiled(pattern).fullmatch(name)
    assert match is not None
    first, *rest = other.split("*")
    return first + "".join(f"{text}{part}" for text, part in zip(match.groups(), rest, strict=True))
