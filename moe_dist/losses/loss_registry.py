"""The terms behind the sections of a recipe's `losses`.

A new term is its settings (config/losses.py), one class and one line here.
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

LOSSES: dict[type[TermSettings], Any] = {  # the Term of each settings class
    CausalRoutersSettings: CausalRouters,
    LoadBalanceSettings: LoadBalance,
    ManifoldSettings: Manifold,
    PooledBalanceSettings: PooledBalance,
    RouterZSettings: RouterZ,
}
