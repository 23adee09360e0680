"""The expert layer: router -> plan -> dispatch -> experts -> combine.

Shape suffixes: T tokens, D model width, R rows.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_dist.config.model_section import MoEFFN
from moe_dist.core.batch import TokenInfo
from moe_dist.core.costs import LayerWork, Product
from moe_dist.core.routing_plan import RoutingRecord
from moe_dist.model.moe.dispatch import Dispatcher, make_dispatcher
from moe_dist.model.moe.experts import Experts
from moe_dist.model.moe.placement import make_placement
from moe_dist.model.moe.router import Router, router_parameters, router_products
from moe_dist.model.moe.router_registry import build_experts, build_router
from moe_dist.model.moe.shared_expert import SharedExpert
from moe_dist.model.site import Site
from moe_dist.parallel.layout import Layout


class MoELayer(nn.Module):
    """The expert layer, which sends each token to its experts and adds up the results.

    The output for a token without an expert (padding, or not chosen by expert choice) is zero, or the output of the
    shared expert if there is one.
    """

    def __init__(
        self, router: Router, dispatcher: Dispatcher, experts: Experts, shared_expert: SharedExpert | None = None
    ):
        super().__init__()
        self.router, self.dispatcher, self.experts = router, dispatcher, experts
        self.shared_expert = shared_expert

    def forward(self, x_TD: Tensor, info: TokenInfo) -> tuple[Tensor, RoutingRecord]:
        """Return y_TD in the dtype of x_TD, and the record of the routing."""
        plan, record = self.router(x_TD, info)
        token_id_T = info.token_id_T if self.experts.needs_token_ids else None
        rows_RD, receipt = self.dispatcher.dispatch(x_TD, plan, token_id_T)
        y_RD = self.experts(rows_RD, receipt.counts_e, receipt.weights_R, receipt.token_id_R)
        y_TD = self.dispatcher.combine(y_RD, receipt)
        return (y_TD if self.shared_expert is None else y_TD + self.shared_expert(x_TD, info)), record

    def products(self, work: LayerWork) -> list[Product]:
        gates = router_products(self.get_submodule("router"), work.scored)
        shared = [] if self.shared_expert is None else self.shared_expert.products(work)
        return [*shared, *self.experts.products(work.rows, [product for gate in gates for product in gate])]

    def detached_products(self, work: LayerWork) -> list[list[Product]]:
        return router_products(self.get_submodule("router"), work.scored, detached=True)

    def num_parameters(self, experts: float | None = None) -> float:
        """Count the parameters over all ranks.

        experts: the number of experts to count. By default, all experts are counted.
        """
        counted = self.router.num_experts if experts is None else experts
        shared = 0 if self.shared_expert is None else self.shared_expert.num_parameters()
        return router_parameters(self.get_submodule("router")) + self.experts.num_parameters(counted) + shared


def build_moe_layer(ffn: MoEFFN, site: Site, layout: Layout) -> MoELayer:
    """Build an expert layer with this rank's experts.

    The initial values depend on the seed and the parameter names, not on the layout. Raises UserError if the experts
    cannot be divided equally among the ranks, or if the expert class does not fit the router (build_experts).
    """
    router = build_router(ffn.router, site.child("router"))
    placement = make_placement(router.expert_groups, layout.expert, ffn.slices)
    experts = build_experts(ffn, router, placement.local_experts[layout.ep_rank], site.child("experts"))
    shared = None if ffn.shared_expert is None else SharedExpert(ffn.shared_expert, site.child("shared_expert"))
    return MoELayer(router, make_dispatcher(placement, layout), experts, shared)


def routers(model: nn.Module) -> list[Router]:
    """Return the routers of the expert layers in order. The list is empty for a dense model."""
    return [module.router for module in model.modules() if isinstance(module, MoELayer)]
