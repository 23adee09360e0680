"""One transformer block: attention, then a feed-forward part, either dense or a mixture of experts.

Shape suffixes: T tokens, D model width, d size per head.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_dist.config.model_section import DenseFFN, ModelConfig
from moe_dist.core.batch import TokenInfo
from moe_dist.core.costs import LayerWork, Product, no_products
from moe_dist.core.routing_plan import RoutingRecord
from moe_dist.model.attention import Documents
from moe_dist.model.mcore import Attention
from moe_dist.model.moe.moe_layer import MoELayer, build_moe_layer
from moe_dist.model.moe.swiglu import SwiGLU
from moe_dist.model.site import Site
from moe_dist.parallel.layout import Layout


class Block(nn.Module):
    """Residual block with attention and a feed-forward part.

    The setting `model.norm` decides where the norms are applied:
    swin: h = x + norm(attn(x)), out = h + norm(ffn(h)) (Chameleon, arXiv 2405.09818; MoMa, arXiv 2407.21770).
    pre: h = x + attn(norm(x)), out = h + ffn(norm(h)).
    """

    ffn: SwiGLU | MoELayer

    def __init__(self, config: ModelConfig, site: Site, layout: Layout):
        super().__init__()
        self.norm_first = config.norm == "pre"
        self.attention = Attention(config, site.child("attention"))
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.ffn = build_ffn(config, site.child("ffn"), layout)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)

    def forward(
        self, x_TD: Tensor, info: TokenInfo, documents: Documents, turn_2T1d: Tensor
    ) -> tuple[Tensor, RoutingRecord | None]:
        if self.norm_first:
            x_TD = x_TD + self.attention(self.attention_norm(x_TD), info.token_id_T, documents, turn_2T1d)
            y_TD, record = self.ffn(self.ffn_norm(x_TD), info)
            return x_TD + y_TD, record
        x_TD = x_TD + self.attention_norm(self.attention(x_TD, info.token_id_T, documents, turn_2T1d))
        y_TD, record = self.ffn(x_TD, info)
        return x_TD + self.ffn_norm(y_TD), record

    def products(self, work: LayerWork) -> list[Product]:
        return [
            *self.attention.products(work),
            no_products(self.attention_norm),
            *self.ffn.products(work),
            no_products(self.ffn_norm),
        ]

    def detached_products(self, work: LayerWork) -> list[list[Product]]:
        """Return the matrix products of the block's auxiliary routers, one list per router.

        These products are listed separately, because no gradient flows back from an auxiliary router to the block.
        work: the amount of work that the block does for a micro-batch.
        """
        return self.ffn.detached_products(work) if isinstance(self.ffn, MoELayer) else []

    def num_parameters(self, experts: float | None) -> float:
        """Count the parameters of the block. experts: the number of experts to include, or None for all experts."""
        norms = 2 * self.attention_norm.normalized_shape[0]
        return self.attention.num_parameters() + norms + self.ffn.num_parameters(experts)


def build_ffn(config: ModelConfig, site: Site, layout: Layout) -> SwiGLU | MoELayer:
    """Build the feed-forward part of a block: a SwiGLU if the block is dense, otherwise an expert layer.

    Both modules are called with (x_TD, info) and return (y_TD, RoutingRecord or None).
    """
    ffn = config.ffn_of(site.layer)
    return SwiGLU(ffn, site) if isinstance(ffn, DenseFFN) else build_moe_layer(ffn, site, layout)
