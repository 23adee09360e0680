"""Registry of the loss classes that a recipe can select in its section `losses`.

To add a term, write its settings (config/losses.py) and one class, and add one line here.
"""

from __future__ import annotations

from typing import Any

from moe_dist.config.losses import (
    CausalRoutersSettings,
    LoadBalanceSettings,
    ManifoldSettings,
    PooledBalanceSettings,
    RouterZSettings,
    TermSettings,
)
from moe_dist.losses.balance import LoadBalance, PooledBalance, RouterZ
from moe_dist.losses.causal_routers import CausalRouters
from moe_dist.losses.manifold import Manifold

LOSSES: dict[type[TermSettings], Any] = {  # settings class -> Term class
    CausalRoutersSettings: CausalRouters,
    LoadBalanceSettings: LoadBalance,
    ManifoldSettings: Manifold,
    PooledBalanceSettings: PooledBalance,
    RouterZSettings: RouterZ,
}
