"""The router of mixture-of-depths, which chooses the tokens that a block admits.

Sources: Raposo et al., arXiv 2404.02258; MoMa, arXiv 2407.21770.

Shape suffixes: T tokens, D model width, V valid tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.config.model_section import DepthConfig
from moe_dist.core.batch import TokenInfo
from moe_dist.core.routing_plan import Routing
from moe_dist.model.moe.auxiliary_router import AuxiliaryRouter, decide_alone
from moe_dist.model.moe.capacity import expert_capacity, keep_within_capacity
from moe_dist.model.moe.router import Gate, selection_keys
from moe_dist.model.site import Site


class DepthRouter(nn.Module):
    """Router that admits the highest-scoring tokens to a block. The score is s = sigmoid(x W), W in R^{D x 1}.

    Among b competing tokens, the k_d = ceil(b c_d) tokens with the highest s are admitted, where c_d is
    `depth.capacity`.

    The setting `depth.scope` decides which tokens compete:
    group: all tokens of a selection group, whatever their modality (as in MoMa, which selects over "the batch").
    modality: the tokens of one modality in a selection group, so that every layer keeps the mix of modalities.
    sequence: the tokens of one packed sequence, as in Raposo et al.

    Padding is never admitted. Ties are broken as in selection_keys. If TokenInfo.causal is set, tokens do not compete:
    the auxiliary router decides for each token independently whether it is admitted. The gate value is s in both cases.
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
        """Return admitted_T (bool) and the Routing of the valid tokens.

        The Routing has one column, which stands for the block.
        """
        token_V, sizes = info.competing(self.settings.scope)
        x_VD = x_TD.index_select(0, token_V)
        logits_V1 = self.gate(x_VD, token_V, info)
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
