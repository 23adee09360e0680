"""The one exception a user is meant to read, what else amounts to it, and the hint at a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: one sentence that names the key, file or number at fault.

    Command lines print the sentence without a traceback and exit with status 2.
    """


class PeerError(Exception):
    """Another rank has run into a defect of ours: the sentence names it; that rank has printed its traceback."""


def as_user_error(error: Exception) -> UserError | None:
    """The UserError that an exception is or amounts to; None for a defect of ours.

    What the operating system says of a file (no permission, no space) is the user's to put right.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return UserError(f"{error.filename}: {error.strerror}")
    return error if isinstance(error, UserError) else None


def closest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that `name` may be a misspelling of; None if none is close."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint to put behind the error sentence of an unknown name; empty if no known name is close."""
    close = closest(name, names)
    return f" (did you mean '{close}'?)" if close else ""
