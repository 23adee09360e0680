"""Exceptions for errors that a user can fix, and for bugs on other ranks.

The functions convert file errors to UserError, and suggest a known name for a misspelt one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MOST_SHOWN = 80  # characters


class UserError(Exception):
    """An error that the user can fix. Its message is one sentence that names the wrong key, file or number.

    Command-line programs print the message without a traceback and exit with status 2. The message is one line:
    characters that cannot be printed, such as a line break in a key, are written as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], message))


class PeerError(Exception):
    """Raised when another rank hit a bug in moe_dist.

    The message contains the exception and the number of the other rank, which has printed the traceback.
    """


def as_user_error(error: Exception) -> UserError | None:
    """Convert an exception to a UserError. Returns None if the exception is a bug in moe_dist.

    A file error of the operating system (no permission, no space) becomes a UserError, because the user can fix it.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return UserError(f"{error.filename}: {error.strerror}")
    return error if isinstance(error, UserError) else None


def cut(text: str) -> str:
    """Shorten the user's text for an error message. Text after the first MOST_SHOWN characters becomes "..."."""
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def closest(name: str, names: Iterable[str]) -> str | None:
    """Return the known name that is closest to the misspelt `name`, or None if no known name is close."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint for an error message about an unknown name, such as ` (did you mean 'steps'?)`.

    The hint is empty if no known name is close.
    """
    close = closest(name, names)
    return f" (did you mean '{close}'?)" if close else ""
