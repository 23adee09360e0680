"""Paths in settings, in which `~` and environment variables are expanded as a shell would."""

from __future__ import annotations

import os
import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator

Text = TypeVar("Text", str, str | None, str | tuple[str, ...], str | tuple[str, ...] | None)

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand(path: str) -> str:
    """Replace `~`, `~user`, `$NAME` and `${NAME}` in a path. Raises ValueError if there is no such user or variable.

    A `pipe:` URL is left as it is, since a shell will expand it.
    """
    if path.startswith("pipe:"):
        return path
    path = _VARIABLE.sub(_value, path)
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"there is no user {expanded.partition('/')[0][1:]}; a folder of this name is ./{expanded}")
    return expanded


def _value(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    if not os.environ.get(name):
        raise ValueError(f"the environment variable {name} is not set or empty")
    return os.environ[name]


def _expand_all(paths: Text) -> Text:
    if isinstance(paths, tuple):
        return tuple(expand(path) for path in paths)
    return paths if paths is None else expand(paths)


PathText = Annotated[str, AfterValidator(expand)]
Paths = Annotated[str | tuple[str, ...], AfterValidator(_expand_all)]
