"""The dense feed-forward part of a block, which is also the base of LoRA experts.

Shape suffixes: T tokens, D model width, F feed-forward width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model_section import DenseFFN
from moe_dist.core.batch import TokenInfo
from moe_dist.core.costs import LayerWork, Product, linear_product, num_weights
from moe_dist.core.fused import fused
from moe_dist.core.initial_values import constant_
from moe_dist.model.site import Site


class SwiGLU(nn.Module):
    """Dense feed-forward part: y = (silu(x W_gate) * (x W_up)) W_down, with an optional bias for each product.

    Source: Shazeer, arXiv 2002.05202, eq. 6.
    """

    def __init__(self, settings: DenseFFN, site: Site):
        super().__init__()
        width, size = site.hidden_size, settings.hidden_size
        self.gate_up = nn.Linear(width, 2 * size, bias=settings.bias)
        self.down = nn.Linear(size, width, bias=settings.bias)
        site.draw(self.gate_up.weight, "gate_up.weight")
        site.draw(self.down.weight, "down.weight", onto_residual=True)
        for linear in (self.gate_up, self.down) if settings.bias else ():
            constant_(linear.bias, 0.0)

    def forward(self, x_TD: Tensor, info: TokenInfo) -> tuple[Tensor, None]:
        """Return y_TD, and None instead of a routing record.

        The argument `info` is unused. It allows a block to call SwiGLU and MoELayer in the same way.
        """
        return self.down(gated(self.gate_up(x_TD))), None

    def products(self, work: LayerWork) -> list[Product]:
        return [linear_product(self.gate_up, work.rows), linear_product(self.down, work.rows)]

    def num_parameters(self, experts: float | None = None) -> int:
        """Count the parameters.

        The argument `experts` is unused. It allows a block to call SwiGLU and MoELayer in the same way.
        """
        linears = (self.gate_up, self.down)
        return sum(num_weights(x) + (0 if x.bias is None else x.out_features) for x in linears)


@fused
def gated(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, where gate and up are the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
