"""Which tokens a block with mixture-of-depths admits (Raposo et al., arXiv 2404.02258; MoMa, arXiv 2407.21770).

Shape suffixes: T tokens, D model width, V valid tokens, all competing sets together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.config.recipe import DepthConfig
from moe_dist.core.batch import TokenInfo
from moe_dist.core.routing_plan import Routing
from moe_dist.model.moe.auxiliary_router import AuxiliaryRouter, decide_alone
from moe_dist.model.moe.capacity import expert_capacity, keep_within_capacity
from moe_dist.model.moe.router import Gate, selection_keys
from moe_dist.model.site import Site


class DepthRouter(nn.Module):
    """s = sigmoid(x W), W in R^{D x 1}; of the tokens that compete, the k_d = ceil(b c_d) of highest s are admitted.

    Who competes (`depth.scope`): the tokens of a selection group, before they are split by modality (group, the paper's
    choice over "the batch"); those of one modality in it (modality: so every layer keeps the mix of the modalities); or
    those of one packed sequence (sequence, as Raposo et al.). Padding is never admitted. Ties are broken as in
    selection_keys. With TokenInfo.causal the auxiliary router decides about each token alone; s stays.
    """

    causal = False

    def __init__(self, settings: DepthConfig, site: Site):
        super().__init__()
        self.settings, self.layer = settings, site.layer
        self.has_auxiliary = settings.auxiliary
        self.key = site.key("ties")
        self.gate = Gate(1, site)
        self.auxiliary = AuxiliaryRouter(1, site) if settings.auxiliary else None

    def forward(self, x_TD: Tensor, info: TokenInfo) -> tuple[Tensor, Routing]:
        """admitted_T (bool), and the decision about every valid token with its gate value, in one column."""
        token_V, sizes = info.competing(self.settings.scope)
        x_VD = x_TD.index_select(0, token_V)
        logits_V1 = self.gate(x_VD)
        auxiliary_V1 = None if self.auxiliary is None else self.auxiliary(x_VD)
        if info.causal:
            admitted_V1 = decide_alone(auxiliary_V1, self.layer)
        else:
            keys_V1 = selection_keys(logits_V1, info, self.key, self.settings.scope)
            capacities = [expert_capacity(size, self.settings.capacity, 1) for size in sizes]
            admitted_V1 = keep_within_capacity(torch.ones_like(keys_V1, dtype=torch.bool), keys_V1, sizes, capacities)
        admitted_T = torch.zeros_like(info.valid_T).index_copy(0, token_V, admitted_V1.squeeze(1))
        return admitted_T, Routing(
            token_V=token_V,
            logits_VC=logits_V1,
            probs_VC=logits_V1.sigmoid(),
            chosen_VC=admitted_V1,
            kept_VE=admitted_V1,
            auxiliary_VC=auxiliary_V1,
        )
