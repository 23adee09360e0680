"""The routers a recipe may name: `model.ffn.router.type`. A new routing idea is one class and one line here."""

from __future__ import annotations

import difflib
from typing import Any

from moe_dist.config import validate
from moe_dist.errors import UserError
from moe_dist.moe.expert_choice import ExpertChoiceRouter, ModalityRouter
from moe_dist.moe.router import Router, RouterSettings, Site, TopKRouter

ROUTERS: dict[str, Any] = {
    "top_k": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "modality": ModalityRouter,
}


def router_settings(raw: dict[str, Any], prefix: str = "model.ffn.router") -> RouterSettings:
    """Validate the settings of a router and of its children. Raises UserError naming the key under `prefix`."""
    kind = raw.get("type")
    if kind not in ROUTERS:
        close = difflib.get_close_matches(str(kind), ROUTERS, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else f": one of {', '.join(ROUTERS)}"
        raise UserError(f"key '{prefix}.type': there is no router '{kind}'{hint}")
    settings = validate(ROUTERS[kind].Settings, raw, "router", prefix)
    for name, child in settings.children().items():
        router_settings(child, f"{prefix}.{name}")
    return settings


def build_router(raw: dict[str, Any], site: Site) -> Router:
    """Build the router that `raw` describes, children first. Raises UserError for bad settings."""
    settings = router_settings(raw)
    children = {name: build_router(child, site.child(name)) for name, child in settings.children().items()}
    return ROUTERS[raw["type"]](settings, site, **children)
