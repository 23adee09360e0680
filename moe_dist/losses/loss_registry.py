"""Registry of the loss terms that a recipe may add as `losses.NAME`. A new term is one class and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_dist.core.errors import UserError, did_you_mean
from moe_dist.core.strict import validate
from moe_dist.losses.balance import LoadBalance, PooledBalance, RouterZ
from moe_dist.losses.causal_routers import CausalRouters
from moe_dist.losses.manifold import Manifold
from moe_dist.losses.term import TermClass, TermSettings

LOSSES: dict[str, TermClass] = {
    "causal_routers": CausalRouters,
    "load_balance": LoadBalance,
    "manifold": Manifold,
    "pooled_balance": PooledBalance,
    "router_z": RouterZ,
}


def loss_settings(raw: Mapping[str, dict[str, Any]]) -> dict[str, TermSettings]:
    """Validate the `losses` section of a recipe. Raises UserError naming the key."""
    for name in raw:
        if name not in LOSSES:
            hint = did_you_mean(name, LOSSES) or f": one of {', '.join(LOSSES)}"
            raise UserError(f"key 'losses.{name}': there is no such loss{hint}")
    return {name: validate(LOSSES[name].Settings, section, "recipe", f"losses.{name}") for name, section in raw.items()}
