"""Optional packages, grouped as extras in setup.cfg. Modules import them inside the functions that need them."""

from __future__ import annotations

import importlib.util

from moe_dist.core.errors import UserError


class MissingExtra(UserError):
    """The error for a package of an extra that is not installed."""


def require_extra(package: str, extra: str, purpose: str) -> None:
    """Raise MissingExtra, naming the purpose and the extra, if `package` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(f"{purpose} needs the package {package}: pip install 'moe_dist[{extra}]'")
