"""DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2), which balances the load with a bias that has no gradient.

Shape suffixes: V routed (valid) tokens, E experts, G groups of experts, e experts of a group, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.routers import DeepSeekV3Settings
from moe_dist.core.batch import TokenInfo
from moe_dist.core.initial_values import constant_
from moe_dist.core.seeding import fold_key
from moe_dist.model.moe.router import Site, selection_keys
from moe_dist.model.moe.token_choice import TokenChoiceRouter

LOWEST, HIGHEST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


class ExpertBias(nn.Module):
    """The selection bias of each expert, which stays float32 even if the model is cast to another dtype.

    The bias is a buffer, so checkpoints include it.
    """

    value: Tensor

    def __init__(self, num_experts: int):
        super().__init__()
        self.register_buffer("value", torch.empty(num_experts, dtype=torch.float32))
        constant_(self.value, 0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertBias:
        changed = fn(self.value)
        self.value = changed if changed.dtype == torch.float32 else self.value.to(changed.device)
        return self


class DeepSeekV3Router(TokenChoiceRouter):
    """Router in which every valid token takes the k experts with the highest s + b (eq. 15, 16).

    Here, s = sigmoid(x W) is the token's score for an expert, and b is the expert's bias.

    Groups: the experts form `groups` equal groups (DeepSeek-V2's device-limited routing). A token's score for a group
    is the sum of the two highest s + b in the group. The token takes experts only from the `top_groups` groups with the
    highest scores.
    Combine weight: s without the bias, divided by the sum of s over the chosen experts (eq. 13) and multiplied by
    `scale`.
    Bias: after every optimizer step, b rises by `bias_rate` if the expert's load is below the mean over the experts. It
    falls by `bias_rate` if the load is above the mean.
    """

    has_state = True

    settings: DeepSeekV3Settings

    def __init__(self, settings: DeepSeekV3Settings, site: Site):
        super().__init__(settings, site)
        self.experts_per_token = settings.top_k if settings.capacity_factor is None else None
        self.group_key = fold_key(site.seed, site.name, "groups")
        self.bias = ExpertBias(settings.num_experts)

    def probabilities(self, logits_VC: Tensor) -> Tensor:
        return logits_VC.sigmoid()

    def weights(self, logits_VC: Tensor, chosen_Vk: Tensor) -> Tensor:
        return F.logsigmoid(logits_VC).gather(1, chosen_Vk).softmax(dim=1) * self.settings.scale

    def choose(self, logits_VC: Tensor, info: TokenInfo) -> Tensor:
        scores_VE = self.biased_scores(logits_VC)
        keys_VE = selection_keys(scores_VE, info, self.key)
        if self.settings.top_groups < self.settings.groups:
            keys_VG = selection_keys(self.group_scores(scores_VE), info, self.group_key)
            keys_VE = keys_VE.masked_fill(~self.of_experts(self.highest_groups(keys_VG)), LOWEST)
        return keys_VE.topk(self.settings.top_k, dim=1).indices

    def biased_scores(self, logits_VE: Tensor) -> Tensor:
        """Return s + b for every expert, [V, E], detached from the autograd graph."""
        return logits_VE.detach().sigmoid() + self.bias.value

    def group_scores(self, scores_VE: Tensor) -> Tensor:
        """Return the sum of the two highest scores in each group, [V, G]."""
        scores_VGe: Tensor = scores_VE.unflatten(1, (self.settings.groups, -1))
        return scores_VGe.topk(2, dim=2).values.sum(dim=2)

    def highest_groups(self, keys_VG: Tensor) -> Tensor:
        """Return a bool tensor [V, G] that marks, for each token, the `top_groups` groups with the highest keys.

        keys_VG: selection keys, computed from the group scores.
        """
        first = keys_VG.topk(self.settings.top_groups, dim=1).indices
        return torch.zeros_like(keys_VG, dtype=torch.bool).scatter(1, first, True)

    def of_experts(self, groups_VG: Tensor) -> Tensor:
        """Repeat the value of each group for every expert in the group: [V, G] -> [V, E]."""
        return groups_VG.repeat_interleave(self.num_experts // self.settings.groups, dim=1)

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        """Move each bias by `bias_rate` towards a balanced load.

        load_E: the number of assignments of each expert in the step's global batch, without padding.
        """
        below_E = (load_E.sum() - load_E * self.num_experts).sign()  # integers, so exact in every layout
        self.bias.value.add_(below_E, alpha=self.settings.bias_rate)
