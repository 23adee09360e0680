"""Auxiliary routers: causal substitutes for routers whose choice depends on later tokens (MoMa, arXiv 2407.21770, eq.
3-4).

An expert-choice router or a mixture-of-depths router gets an auxiliary router if its settings say `auxiliary: true`.
The auxiliary router sees each token independently of the others and is trained to predict the main router's choice for
the token (losses/causal_routers.py), usually in a separate stage in which all other parameters are frozen. Its input is
detached, so its gradient never reaches the rest of the model. Its logits are stored in Routing.auxiliary_VC.

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
    """A small network that predicts the main router's choices: aux(x) = sigmoid(SiLU(x W1) W2), in float32.

    The network has one output per column of the main router.
    """

    detached = True

    def __init__(self, columns: int, site: Site):
        """Create the network. The main router must store it as its attribute `auxiliary`.

        columns: the number of columns of the main router. site: the main router's place in the model.
        """
        super().__init__()
        width, hidden = site.hidden_size, site.hidden_size // 2
        self.width, self.hidden, self.columns = width, hidden, columns
        self.w1 = nn.Parameter(torch.empty(hidden, width, dtype=torch.float32))
        self.w2 = nn.Parameter(torch.empty(columns, hidden, dtype=torch.float32))
        for name in ("w1", "w2"):
            site.draw(getattr(self, name), f"auxiliary.{name}")

    def forward(self, x_VD: Tensor) -> Tensor:
        """Return the logits [V, C], before the sigmoid."""
        return precise_linear(F.silu(precise_linear(x_VD.detach(), self.w1)), self.w2)

    def products(self, tokens: int) -> list[Product]:
        first, second = self.width * self.hidden, self.hidden * self.columns
        return [Product(first * tokens, (self.w1,)), Product(second * tokens, (self.w2,))]

    def num_parameters(self) -> int:
        return self.hidden * (self.width + self.columns)


def decide_alone(auxiliary_VC: Tensor | None, layer: int) -> Tensor:
    """Return the choices of an auxiliary router, a bool tensor [V, C] that is true where aux(x) > 0.5 (logit > 0).

    auxiliary_VC: the logits of the auxiliary router. Raises UserError if it is None, which means that the router of
    this layer has no auxiliary router.
    """
    if auxiliary_VC is None:
        raise UserError(
            f"layer {layer} has no auxiliary router, so its routing is not causal: train one first "
            "(auxiliary: true, see docs/moma.md)"
        )
    return auxiliary_VC > 0
