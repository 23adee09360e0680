"""The one exception a user is meant to read, and what else amounts to it."""

from __future__ import annotations


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
