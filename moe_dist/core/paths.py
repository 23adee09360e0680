"""Expansion of `~` and environment variables in the paths of settings, as in a shell."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from moe_dist.core.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand(path: str) -> str:
    """Replace `~`, `~user`, `$NAME` and `${NAME}` in a path.

    A `pipe:` URL is returned unchanged, because a shell will expand it. Raises ValueError if there is no such user or
    variable, or if the path is empty or has a null character.
    """
    if not path or "\0" in path:
        raise ValueError("a path is not empty and has no null character")
    if path.startswith("pipe:"):
        return path
    path = _VARIABLE.sub(_value, path)
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"there is no user {expanded.partition('/')[0][1:]}; a folder of this name is ./{expanded}")
    return expanded


def path_setting(key: str, value: object) -> Path:
    """Return the value of the setting `key` as a path, expanded. Raises UserError if it is not a valid path."""
    if not isinstance(value, str):
        raise UserError(f"key '{key}': a path is a text, not {value}; write it in quotes")
    try:
        return Path(expand(value))
    except ValueError as error:
        raise UserError(f"key '{key}': {error}") from None


def _value(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    if not os.environ.get(name):
        raise ValueError(f"the environment variable {name} is not set or empty")
    return os.environ[name]


def _expand_all(paths: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if paths == ():
        raise ValueError("the list names no path")
    return expand(paths) if isinstance(paths, str) else tuple(expand(path) for path in paths)


PathText = Annotated[str, AfterValidator(expand)]
Paths = Annotated[str | tuple[str, ...], AfterValidator(_expand_all)]
