"""The expert layer: router -> plan -> dispatch -> experts -> combine.

Shape suffixes: T tokens, D model width, R rows.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_dist.config.recipe import MoEFFN
from moe_dist.core.batch import TokenInfo
from moe_dist.core.routing_plan import RoutingRecord
from moe_dist.model.moe.dispatch import Dispatcher, make_dispatcher
from moe_dist.model.moe.experts import Experts
from moe_dist.model.moe.placement import make_placement
from moe_dist.model.moe.router import Router, Site
from moe_dist.model.moe.router_registry import build_experts, build_router
from moe_dist.parallel.layout import Layout


class MoELayer(nn.Module):
    """Sends every token through its experts; a token without one (padding, or left out by expert choice) gets zero."""

    def __init__(self, router: Router, dispatcher: Dispatcher, experts: Experts):
        super().__init__()
        self.router, self.dispatcher, self.experts = router, dispatcher, experts

    def forward(self, x_TD: Tensor, info: TokenInfo) -> tuple[Tensor, RoutingRecord]:
        """y_TD in the dtype of x_TD, and what the router saw and decided."""
        plan, record = self.router(x_TD, info)
        token_id_T = info.token_id_T if self.experts.needs_token_ids else None
        rows_RD, receipt = self.dispatcher.dispatch(x_TD, plan, token_id_T)
        y_RD = self.experts(rows_RD, receipt.counts_e, receipt.weights_R, receipt.token_id_R)
        return self.dispatcher.combine(y_RD, receipt), record


def build_moe_layer(
    ffn: MoEFFN, *, hidden_size: int, layer: int, seed: int, layout: Layout, init_std: float, output_std: float
) -> MoELayer:
    """The expert layer number `layer` of a model, with the experts that live on this rank, initialised by name.

    `output_std`: standard deviation of the experts' output projections. Raises UserError where recipe and ranks do
    not fit.
    """
    name = f"layers.{layer}.ffn"
    router = build_router(
        ffn.router,
        Site(hidden_size=hidden_size, layer=layer, seed=seed, init_std=init_std, name=f"{name}.router"),
    )
    placement = make_placement(router.expert_groups, layout.expert, ffn.slices)
    experts = build_experts(
        ffn,
        router,
        expert_ids=placement.local_experts[layout.ep_rank],
        hidden_size=hidden_size,
        seed=seed,
        name=f"{name}.experts",
        init_std=init_std,
        output_std=output_std,
    )
    return MoELayer(router, make_dispatcher(placement, layout), experts)


def routers(model: nn.Module) -> list[Router]:
    """Return the routers of the expert layers, from the first; none in a dense model."""
    return [module.router for module in model.modules() if isinstance(module, MoELayer)]
