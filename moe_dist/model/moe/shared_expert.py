"""The shared expert of an expert layer, which processes every token.

Shape suffixes: T tokens, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_dist.config.model_section import DenseFFN, SharedExpertConfig
from moe_dist.core.batch import TokenInfo
from moe_dist.core.costs import LayerWork, Product, linear_product, num_weights
from moe_dist.model.moe.swiglu import SwiGLU
from moe_dist.model.site import Site


class SharedExpert(nn.Module):
    """SwiGLU feed-forward for every token (DeepSeekMoE, arXiv 2401.06066, eq. 9), the same on every rank.

    With a gate, the output is sigmoid(x w) SwiGLU(x), as in Qwen2-MoE.
    """

    def __init__(self, settings: SharedExpertConfig, site: Site):
        super().__init__()
        dense = DenseFFN(type="dense", hidden_size=settings.hidden_size)
        self.ffn = SwiGLU(dense, site.child("ffn"), target="shared_expert")
        self.gate = nn.Linear(site.hidden_size, 1, bias=False) if settings.gate else None
        if self.gate is not None:
            site.draw(self.gate.weight, "gate.weight")

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Tensor:
        y_TD: Tensor = self.ffn(x_TD, info)[0]
        return y_TD if self.gate is None else y_TD * self.gate(x_TD).sigmoid()

    def products(self, work: LayerWork) -> list[Product]:
        rows = LayerWork(document_lengths=work.document_lengths, rows=work.tokens)
        gates = [] if self.gate is None else [linear_product(self.gate, work.tokens)]
        return [*self.ffn.products(rows), *gates]

    def num_parameters(self) -> int:
        return self.ffn.num_parameters() + (0 if self.gate is None else num_weights(self.gate))
