"""Optional packages, grouped as extras in setup.cfg. They are imported inside the functions that need them."""

from __future__ import annotations

import importlib.util

from moe_dist.core.errors import UserError


class MissingExtra(UserError):
    """Raised when an optional package is not installed. The message names the extra that contains the package."""


def require_extra(package: str, extra: str, purpose: str) -> None:
    """Raise MissingExtra if `package` is not installed.

    extra: the name of the extra that contains the package. purpose: what needs the package. Both are part of the
    message.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(f"{purpose} needs the package {package}: pip install 'moe_dist[{extra}]'")
