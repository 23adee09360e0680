"""The routers and experts a recipe may name: `model.ffn.router.type`, `model.ffn.experts.type`.

A new routing idea is one class and one line here; new experts also need their settings in config.py.
"""

from __future__ import annotations

from typing import Any

from moe_dist.config.recipe import MoEFFN
from moe_dist.core.errors import UserError, did_you_mean
from moe_dist.core.strict import validate
from moe_dist.model.moe.deepseek_router import DeepSeekV3Router
from moe_dist.model.moe.expert_choice import ExpertChoiceRouter, ModalityRouter
from moe_dist.model.moe.experts import Experts, GroupedExperts, HeldExperts
from moe_dist.model.moe.lora_experts import LoRAExperts
from moe_dist.model.moe.router import Router, RouterSettings
from moe_dist.model.moe.token_choice import NullExpertRouter, TopKRouter
from moe_dist.model.site import Site

ROUTERS: dict[str, Any] = {
    "top_k": TopKRouter,
    "null_experts": NullExpertRouter,
    "expert_choice": ExpertChoiceRouter,
    "modality": ModalityRouter,
    "deepseek_v3": DeepSeekV3Router,
}

EXPERTS: dict[str, Any] = {
    "swiglu": GroupedExperts,
    "lora": LoRAExperts,
}


def router_settings(raw: dict[str, Any], prefix: str = "model.ffn.router") -> RouterSettings:
    """Validate the settings of a router and of its children. Raises UserError naming the key under `prefix`."""
    kind = raw.get("type")
    if kind not in ROUTERS:
        hint = did_you_mean(str(kind), ROUTERS) or f": one of {', '.join(ROUTERS)}"
        raise UserError(f"key '{prefix}.type': there is no router '{kind}'{hint}")
    settings: RouterSettings = validate(ROUTERS[kind].Settings, raw, "router", prefix)
    for name, child in settings.children().items():
        router_settings(child, f"{prefix}.{name}")
    return settings


def build_router(raw: dict[str, Any], site: Site) -> Router:
    """Build the router that `raw` describes, children first. Raises UserError for bad settings."""
    settings = router_settings(raw)
    children = {name: build_router(child, site.child(name)) for name, child in settings.children().items()}
    router: Router = ROUTERS[raw["type"]](settings, site, **children)
    return router


def build_experts(ffn: MoEFFN, router: Router, expert_ids: tuple[int, ...], site: Site) -> Experts:
    """Build the experts that a rank holds, as `model.ffn.experts` describes them.

    Raises UserError where the router does not give every token as many experts as they need.
    """
    needed = EXPERTS[ffn.experts.type].experts_per_token
    if needed is not None and router.experts_per_token != needed:
        raise UserError(
            f"model.ffn.experts.type={ffn.experts.type} needs exactly {needed} expert for every token: "
            f"model.ffn.router must be of type top_k, with top_k={needed} and no capacity_factor"
        )
    size, slices = ffn.hidden_size // ffn.slices, ffn.slices
    held = HeldExperts(expert_ids=expert_ids, size=size, slices=slices, site=site)
    experts: Experts = EXPERTS[ffn.experts.type](ffn.experts, held)
    return experts
