"""Auxiliary routers: causal stand-ins for routers whose choice looks at later tokens (MoMa, arXiv 2407.21770, eq. 3-4).

One stands beside each expert-choice router and each depth gate that asks for it. It sees a token and nothing else, and
is trained to say what the main router does with it (losses/causal_routers.py), usually in a stage of its own with all
else frozen; its input is detached, so no gradient reaches the model in any case. Its logits are in
Routing.auxiliary_VC.

Shape suffixes: D model width, H hidden width D/2, V routed tokens, C columns of the main router.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.core.costs import Product
from moe_dist.core.errors import UserError
from moe_dist.model.moe.router import RouterPart, precise_linear
from moe_dist.model.site import Site


class AuxiliaryRouter(RouterPart):
    """aux(x) = sigmoid(SiLU(x W1) W2), one output for each column of the main router, in float32."""

    detached = True

    def __init__(self, columns: int, site: Site):
        """site: the main router's, which has it as `auxiliary`."""
        super().__init__()
        width, hidden = site.hidden_size, site.hidden_size // 2
        self.width, self.hidden, self.columns = width, hidden, columns
        self.w1 = nn.Parameter(torch.empty(hidden, width, dtype=torch.float32))
        self.w2 = nn.Parameter(torch.empty(columns, hidden, dtype=torch.float32))
        for name in ("w1", "w2"):
            site.draw(getattr(self, name), f"auxiliary.{name}")

    def forward(self, x_VD: Tensor) -> Tensor:
        """[V, C] before the sigmoid."""
        return precise_linear(F.silu(precise_linear(x_VD.detach(), self.w1)), self.w2)

    def products(self, tokens: int) -> list[Product]:
        first, second = self.width * self.hidden, self.hidden * self.columns
        return [Product(first * tokens, (self.w1,)), Product(second * tokens, (self.w2,))]

    def num_parameters(self) -> int:
        return self.hidden * (self.width + self.columns)


def decide_alone(auxiliary_VC: Tensor | None, layer: int) -> Tensor:
    """bool [V, C]: aux(x) > 0.5, which is a logit above 0. Raises UserError where there is no auxiliary router."""
    if auxiliary_VC is None:
        raise UserError(
            f"layer {layer} has no auxiliary router, without which its routing is not causal: train one first "
            "(auxiliary: true, see docs/moma.md)"
        )
    return auxiliary_VC > 0
