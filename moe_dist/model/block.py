"""One transformer block: attention, then a feed-forward part that is dense or a mixture of experts.

Shape suffixes: T tokens, D model width, d size per head.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_dist.config.recipe import DenseFFN, ModelConfig
from moe_dist.core.batch import TokenInfo
from moe_dist.core.routing_plan import RoutingRecord
from moe_dist.model.attention import Documents
from moe_dist.model.mcore import Attention, output_std
from moe_dist.model.moe.moe_layer import build_moe_layer
from moe_dist.model.moe.swiglu import SwiGLU
from moe_dist.parallel.layout import Layout


class Block(nn.Module):
    """Residual block. swin: h = x + norm(attn(x)), out = h + norm(ffn(h)) (Chameleon, arXiv 2405.09818; MoMa).
    pre: h = x + attn(norm(x)), out = h + ffn(norm(h))."""

    def __init__(self, config: ModelConfig, *, layer: int, seed: int, layout: Layout):
        super().__init__()
        self.norm_first = config.norm == "pre"
        self.attention = Attention(config, layer=layer, seed=seed)
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.ffn = build_ffn(config, layer=layer, seed=seed, layout=layout)
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


def build_ffn(config: ModelConfig, *, layer: int, seed: int, layout: Layout) -> nn.Module:
    """The feed-forward part of block number `layer`. Called as (x_TD, info) -> (y_TD, RoutingRecord or None)."""
    stds = {"init_std": config.init_std, "output_std": output_std(config)}
    if isinstance(config.ffn, DenseFFN):
        name = f"layers.{layer}.ffn"
        return SwiGLU(config.hidden_size, config.ffn.hidden_size, seed=seed, name=name, **stds)
    return build_moe_layer(config.ffn, hidden_size=config.hidden_size, layer=layer, seed=seed, layout=layout, **stds)
