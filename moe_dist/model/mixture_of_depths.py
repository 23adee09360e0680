"""Mixture-of-depths around a block: the block processes the tokens that a gate admits; the others skip it unchanged.

Shape suffixes: T tokens, K admitted tokens, D model width, V valid tokens, d size per head.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_dist.config.model_section import DepthConfig
from moe_dist.core.batch import TokenInfo
from moe_dist.core.costs import LayerWork, Product
from moe_dist.core.routing_plan import DepthRecord, RoutingRecord
from moe_dist.model.attention import Documents
from moe_dist.model.block import Block
from moe_dist.model.moe.depth_router import DepthRouter
from moe_dist.model.moe.dispatch import SplitSizes, split_sizes
from moe_dist.model.moe.router import router_parameters, router_products
from moe_dist.model.site import Site


class MixtureOfDepths(nn.Module):
    """Wrapper around a block: returns x + s (block(x) - x) for admitted tokens and x for the other tokens.

    Source: Raposo et al., arXiv 2404.02258, eq. 1. The gate value s is a sigmoid, as in MoMa (arXiv 2407.21770). It
    multiplies the block's update of the residual stream, so the gate gets a gradient.

    The block sees only the admitted tokens: each of them attends to the earlier admitted tokens of its document, and
    expert choice selects among the admitted tokens. All tokens keep their positions.

    The wrapper is called with the same arguments as the block. It does not register the block as its own submodule,
    because the model's layers contain the block already. The block's parameters therefore have the same names as
    without mixture-of-depths, and a stage with mixture-of-depths can start from a checkpoint without it.

    split_sizes: copies the numbers of admitted tokens to the host. This costs one device-to-host sync, in addition to
    that of the expert layer.
    """

    def __init__(self, block: Block, settings: DepthConfig, site: Site, split_sizes: SplitSizes = split_sizes):
        super().__init__()
        self._unregistered = (block,)  # torch does not register a module inside a tuple
        self.layer, self.split_sizes = site.layer, split_sizes
        self.router = DepthRouter(settings, site.child("router"))

    @property
    def block(self) -> Block:
        return self._unregistered[0]

    def forward(
        self, x_TD: Tensor, info: TokenInfo, documents: Documents, turn_2T1d: Tensor
    ) -> tuple[Tensor, RoutingRecord | None, DepthRecord]:
        """Return the hidden states of all T tokens, the block's routing record and the record of admitted tokens.

        The block routes only the admitted tokens. In the returned routing record, token indices refer to all T tokens.
        The routing record of a dense block is None.
        """
        admitted_T, routing = self.router(x_TD, info)
        token_K, inner = info.select(admitted_T, self.split_sizes)
        x_KD = x_TD.index_select(0, token_K)
        y_KD, record = self.block(x_KD, inner, documents.select(inner), turn_2T1d.index_select(1, token_K))
        gate_T1 = routing.probs_VC.new_zeros(info.num_tokens, 1).index_copy(0, routing.token_V, routing.probs_VC)
        gate_K1 = gate_T1.index_select(0, token_K).to(x_TD.dtype)
        x_TD = x_TD.index_add(0, token_K, gate_K1 * (y_KD - x_KD))
        depth = DepthRecord(layer=self.layer, routing=routing, document_lengths=inner.document_lengths)
        return x_TD, None if record is None else record.renumbered(token_K), depth

    def products(self, work: LayerWork) -> list[Product]:
        gates = router_products(self.router, work.depth_scored)
        return [*self.block.products(work), *(product for gate in gates for product in gate)]

    def detached_products(self, work: LayerWork) -> list[list[Product]]:
        return [
            *self.block.detached_products(work),
            *router_products(self.router, work.depth_scored, detached=True),
        ]

    def num_parameters(self, experts: float | None) -> float:
        return self.block.num_parameters(experts) + router_parameters(self.router)
