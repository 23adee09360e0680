"""Loss that trains auxiliary routers.

An auxiliary router sees one token alone. It learns to predict the main router's choice for this token, although
that choice may depend on other tokens.

Shape suffixes: V tokens that a router saw, C columns of a router.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config.losses import CausalRoutersSettings
from moe_dist.core.batch import Batch
from moe_dist.core.errors import UserError
from moe_dist.core.routing_plan import Routing
from moe_dist.core.step import ModelOutput
from moe_dist.losses.term import Context


class CausalRouters:
    """Binary cross-entropy between auxiliary routers and the choices of main routers (MoMa, arXiv 2407.21770, eq. 3-4).

    The loss trains the auxiliary routers of expert layers and of mixture-of-depths. It is the mean over a router's
    columns, over the valid tokens, and over the layers with auxiliary routers. If mixture-of-depths does not admit a
    token to a layer, the token contributes 0 to the loss of that layer's expert router. The inputs of auxiliary routers
    are detached, so the loss has no gradient for other parameters.
    """

    names = ("loss/causal_routers",)

    def __init__(self, settings: CausalRoutersSettings, context: Context):
        pass

    def counts(self, batch: Batch) -> tuple[int, ...]:
        return (sum(map(sum, batch.info.modality_counts)),)

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, ...]:
        layers = [*(record.routings for record in output.records), *((depth.routing,) for depth in output.depths)]
        with_router = [[part for part in parts if part.auxiliary_VC is not None] for parts in layers]
        trained = [parts for parts in with_router if parts]
        if not trained:
            raise UserError(
                "losses.causal_routers: the model has no auxiliary router; set auxiliary: true at each router"
            )
        return (torch.stack([_cross_entropy(part) for parts in trained for part in parts]).sum() / len(trained),)


def _cross_entropy(part: Routing) -> Tensor:
    """Return the cross-entropy between one auxiliary router and its main router's choice.

    It is averaged over columns and summed over tokens.
    """
    assert part.auxiliary_VC is not None
    target_VC = part.chosen_VC.to(part.auxiliary_VC.dtype)
    loss_VC = F.binary_cross_entropy_with_logits(part.auxiliary_VC, target_VC, reduction="none")
    return loss_VC.mean(dim=1).sum()
