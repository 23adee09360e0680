"""The dense feed-forward part of a block, which is also the base of LoRA experts.

Shape suffixes: T tokens, D model width, F feed-forward width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model_section import DenseFFN
from moe_dist.core.batch import TokenInfo
from moe_dist.core.costs import LayerWork, Product
from moe_dist.core.fused import fused
from moe_dist.core.initial_values import constant_
from moe_dist.model.lora import apply_linear, linear_products, make_linear, num_linear_parameters
from moe_dist.model.site import Site


class SwiGLU(nn.Module):
    """Dense feed-forward part: y = (silu(x W_gate) * (x W_up)) W_down, with an optional bias for each product.

    Source: Shazeer, arXiv 2002.05202, eq. 6.
    """

    def __init__(self, settings: DenseFFN, site: Site, target: str = "ffn"):
        """Create the module.

        target: the prefix of the names of the three matrices in LORA_TARGETS. For example, with the prefix "ffn", the
        names are ffn.gate, ffn.up and ffn.down.
        """
        super().__init__()
        width, size, bias = site.hidden_size, settings.hidden_size, settings.bias
        up, down = {"gate": size, "up": size}, {"down": width}
        self.gate_up = make_linear(width, up, target=target, site=site.child("gate_up"), bias=bias)
        self.down = make_linear(size, down, target=target, site=site.child("down"), bias=bias)
        site.draw(self.gate_up.weight, "gate_up.weight")
        site.draw(self.down.weight, "down.weight", onto_residual=True)
        for linear in (self.gate_up, self.down) if bias else ():
            constant_(linear.bias, 0.0)

    def forward(self, x_TD: Tensor, info: TokenInfo) -> tuple[Tensor, None]:
        """Return y_TD, and None instead of a routing record."""
        h_TF = gated(apply_linear(self.gate_up, x_TD, info.token_id_T))
        return apply_linear(self.down, h_TF, info.token_id_T), None

    def products(self, work: LayerWork) -> list[Product]:
        return [*linear_products(self.gate_up, work.rows), *linear_products(self.down, work.rows)]

    def num_parameters(self, experts: float | None = None) -> int:
        """Count the parameters.

        The argument `experts` is unused. It allows a block to call SwiGLU and MoELayer in the same way.
        """
        return num_linear_parameters(self.gate_up) + num_linear_parameters(self.down)


@fused
def gated(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, where gate and up are the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
