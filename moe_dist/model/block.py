"""One transformer block: attention, then a feed-forward part that is dense or a mixture of experts.

Shape suffixes: T tokens, D model width, F feed-forward width, d size per head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.batch import TokenInfo
from moe_dist.config import DenseFFN, ModelConfig
from moe_dist.model.attention import Documents
from moe_dist.model.mcore import Attention, output_std
from moe_dist.moe.layer import build_moe_layer
from moe_dist.moe.plan import RoutingRecord
from moe_dist.moe.random import seeded_normal_
from moe_dist.parallel.layout import Layout


class SwiGLU(nn.Module):
    """y = (silu(x W_gate) * (x W_up)) W_down, without biases (Shazeer, arXiv 2002.05202, eq. 6)."""

    def __init__(self, hidden_size: int, ffn_size: int, *, seed: int, name: str, init_std: float, output_std: float):
        """`name` is the global prefix of the parameters."""
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * ffn_size, bias=False)
        self.down = nn.Linear(ffn_size, hidden_size, bias=False)
        seeded_normal_(self.gate_up.weight, seed=seed, name=f"{name}.gate_up.weight", std=init_std)
        seeded_normal_(self.down.weight, seed=seed, name=f"{name}.down.weight", std=output_std)

    def forward(self, x_TD: Tensor, info: TokenInfo) -> tuple[Tensor, None]:
        """y_TD, and no routing record: the same call as MoELayer's. Every token is treated alike."""
        gate_TF, up_TF = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(F.silu(gate_TF) * up_TF), None


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
        self, x_TD: Tensor, info: TokenInfo, documents: Documents, angles_T11d: Tensor
    ) -> tuple[Tensor, RoutingRecord | None]:
        if self.norm_first:
            x_TD = x_TD + self.attention(self.attention_norm(x_TD), documents, angles_T11d)
            y_TD, record = self.ffn(self.ffn_norm(x_TD), info)
            return x_TD + y_TD, record
        x_TD = x_TD + self.attention_norm(self.attention(x_TD, documents, angles_T11d))
        y_TD, record = self.ffn(x_TD, info)
        return x_TD + self.ffn_norm(y_TD), record


def build_ffn(config: ModelConfig, *, layer: int, seed: int, layout: Layout) -> nn.Module:
    """The feed-forward part of block number `layer`. Called as (x_TD, info) -> (y_TD, RoutingRecord or None)."""
    stds = {"init_std": config.init_std, "output_std": output_std(config)}
    if isinstance(config.ffn, DenseFFN):
        name = f"layers.{layer}.ffn"
        return SwiGLU(config.hidden_size, config.ffn.hidden_size, seed=seed, name=name, **stds)
    return build_moe_layer(config.ffn, hidden_size=config.hidden_size, layer=layer, seed=seed, layout=layout, **stds)
