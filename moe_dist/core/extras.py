"""Optional packages, grouped as extras in setup.cfg. Modules import them inside the functions that need them."""

from __future__ import annotations

import importlib.util

from moe_dist.core.errors import UserError


class MissingExtra(UserError):
    """Raised when an optional package is not installed. The message names the extra that contains the package."""


def require_extra(package: str, extra: str, purpose: str) -> None:
    """Raise MissingExtra if `package` is not installed.

    extra, purpose: for the message, the extra that contains the package and what needs the package.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(f"{purpose} needs the package {package}: pip install 'moe_dist[{extra}]'")
