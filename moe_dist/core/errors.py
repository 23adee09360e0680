"""The exception for errors that a user can fix, its conversion from file errors, and hints for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. Its message is one sentence that names the wrong key, file or number.

    Command lines print the sentence without a traceback and exit with status 2.
    """


class PeerError(Exception):
    """A bug in moe_dist that another rank ran into. The message names it; the other rank has printed its traceback."""


def as_user_error(error: Exception) -> UserError | None:
    """Return an exception as a UserError; None if it is a bug in moe_dist.

    An operating system's error about a file (no permission, no space) becomes a UserError, since the user can fix it.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return UserError(f"{error.filename}: {error.strerror}")
    return error if isinstance(error, UserError) else None


def closest(name: str, names: Iterable[str]) -> str | None:
    """Return the known name that is closest to a misspelt one; None if there is no close one."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint to append to the error sentence of an unknown name; empty if there is no close known name."""
    close = closest(name, names)
    return f" (did you mean '{close}'?)" if close else ""
