"""Registry of the router and expert classes that `model.ffn.router` and `model.ffn.experts` can select.

To add a routing method, write its settings (config/routers.py) and one class, and add one line here.
"""

from __future__ import annotations

from typing import Any

from moe_dist.config.model_section import MoEFFN
from moe_dist.config.routers import (
    DeepSeekV3Settings,
    ExpertChoiceSettings,
    ModalitySettings,
    NullExpertSettings,
    RouterSettings,
    TopKSettings,
)
from moe_dist.core.errors import UserError
from moe_dist.model.moe.deepseek_router import DeepSeekV3Router
from moe_dist.model.moe.expert_choice import ExpertChoiceRouter, ModalityRouter
from moe_dist.model.moe.experts import Experts, GroupedExperts, HeldExperts
from moe_dist.model.moe.lora_experts import MATRICES, AdaptedExperts, LoRAExperts
from moe_dist.model.moe.router import Router
from moe_dist.model.moe.token_choice import NullExpertRouter, TopKRouter
from moe_dist.model.site import Site

ROUTERS: dict[type[RouterSettings], Any] = {  # settings class -> Router class
    TopKSettings: TopKRouter,
    NullExpertSettings: NullExpertRouter,
    ExpertChoiceSettings: ExpertChoiceRouter,
    ModalitySettings: ModalityRouter,
    DeepSeekV3Settings: DeepSeekV3Router,
}

EXPERTS: dict[str, Any] = {
    "swiglu": GroupedExperts,
    "lora": LoRAExperts,
}


def build_router(settings: RouterSettings, site: Site) -> Router:
    """Build a router from its settings. If the router has children, they are built first."""
    children = {name: build_router(child, site.child(name)) for name, child in settings.children().items()}
    router: Router = ROUTERS[type(settings)](settings, site, **children)
    return router


def build_experts(ffn: MoEFFN, router: Router, expert_ids: tuple[int, ...], site: Site) -> Experts:
    """Build the experts of a rank from `model.ffn.experts`.

    Raises UserError if the expert class needs a fixed number of experts per token and the router does not guarantee it.
    """
    needed = EXPERTS[ffn.experts.type].experts_per_token
    if needed is not None and router.experts_per_token != needed:
        raise UserError(
            f"model.ffn.experts.type={ffn.experts.type} needs exactly {needed} expert for every token: "
            f"model.ffn.router must be of type top_k, with top_k={needed} and no capacity_factor"
        )
    size, slices = ffn.hidden_size // ffn.slices, ffn.slices
    held = HeldExperts(expert_ids=expert_ids, size=size, slices=slices, site=site)
    kind: Any = EXPERTS[ffn.experts.type]
    if kind is GroupedExperts and site.adapted("experts", MATRICES):
        kind = AdaptedExperts
    experts: Experts = kind(ffn.experts, held)
    return experts
