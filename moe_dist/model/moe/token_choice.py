"""Token-choice routing: every token takes the k columns with the highest logits. A column is an expert or a null
expert. The setting `drop_policy` says which tokens have priority when an expert is full.

Shape suffixes: T tokens, D model width, V routed (valid) tokens, E experts, C columns (E experts, then null experts), k
columns per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.routers import NullExpertSettings, TokenChoiceSettings, TopKSettings
from moe_dist.core.batch import TokenInfo
from moe_dist.core.routing_plan import Routing, RoutingPlan, RoutingRecord
from moe_dist.model.moe.capacity import expert_capacity, keep_within_capacity, plan_assignments
from moe_dist.model.moe.router import Gate, selection_keys
from moe_dist.model.site import Site


class TokenChoiceRouter(nn.Module):
    """Base class of the token-choice routers. A subclass defines the combine weights of the chosen columns.

    The combine weights are computed before full experts drop assignments. Therefore, if one assignment of a token is
    dropped, the weights of the token's other assignments do not change.
    """

    has_auxiliary = has_state = False
    experts_per_token: int | None = None
    reference_top_k: int | None = None  # experts per token of the model that FLOPs are compared with

    def __init__(self, settings: TokenChoiceSettings, site: Site):
        super().__init__()
        self.settings, self.layer = settings, site.layer
        self.num_experts = settings.num_experts
        self.expert_groups = (tuple(range(settings.num_experts)),)
        # To keep the tokens with the highest gates, a full expert must know all tokens of the group.
        self.causal = settings.capacity_factor is None or settings.drop_policy == "position"
        self.key = site.key("ties")
        self.gate = Gate(settings.columns, site, bias=settings.bias)

    def probabilities(self, logits_VC: Tensor) -> Tensor:
        """Compute the gate values, a softmax over all columns."""
        return logits_VC.softmax(dim=1)

    def weights(self, logits_VC: Tensor, chosen_Vk: Tensor) -> Tensor:
        """Compute the combine weight of each chosen column, [V, k], in float32 or wider."""
        raise NotImplementedError

    def choose(self, logits_VC: Tensor, info: TokenInfo) -> Tensor:
        """Return the columns that each token takes, int64 [V, k]."""
        return selection_keys(logits_VC, info, self.key).topk(self.settings.top_k, dim=1).indices

    def forward(self, x_TD: Tensor, info: TokenInfo) -> tuple[RoutingPlan, RoutingRecord]:
        token_V, sizes = info.competing()
        logits_VC = self.gate(x_TD.index_select(0, token_V), token_V, info)
        probs_VC = self.probabilities(logits_VC)
        chosen_Vk = self.choose(logits_VC, info)
        chosen_VC = torch.zeros_like(logits_VC, dtype=torch.bool).scatter(1, chosen_Vk, True)
        kept_VE = chosen_VC[:, : self.num_experts]
        if self.settings.capacity_factor is not None:
            priority_VE = self._priority(probs_VC, token_V, info)
            kept_VE = keep_within_capacity(kept_VE, priority_VE, sizes, [self._capacity(size) for size in sizes])
        kept_VC = F.pad(kept_VE, (0, self.settings.columns - self.num_experts))
        expert_Vk = chosen_Vk.where(kept_VC.gather(1, chosen_Vk), self.num_experts)
        weight_Vk = self.weights(logits_VC, chosen_Vk)
        plan = plan_assignments(token_V, expert_Vk, weight_Vk, self.num_experts, slots=self._slots(info, sizes))
        if self.settings.capacity_factor is None and self.settings.columns == self.num_experts:
            plan = replace(plan, complete=True)
        routing = Routing(token_V=token_V, logits_VC=logits_VC, probs_VC=probs_VC, chosen_VC=chosen_VC, kept_VE=kept_VE)
        return plan, RoutingRecord(layer=self.layer, plan=plan, routings=(routing,))

    def _capacity(self, num_tokens: int) -> int:
        assert self.settings.capacity_factor is not None
        return expert_capacity(num_tokens, self.settings.capacity_factor, self.settings.columns, self.settings.top_k)

    def _slots(self, info: TokenInfo, sizes: list[int]) -> int | None:
        """Return the number of rows to which every expert is padded, or None if pad_to_capacity is off.

        The number is the capacity for the largest selection group, multiplied by the number of groups. Padding tokens
        count as part of a group. Without mixture-of-depths, all groups therefore have the same size, and the number is
        the same for every micro-batch.
        """
        if not self.settings.pad_to_capacity:
            return None
        return info.num_groups * self._capacity(max(info.num_tokens // info.num_groups, *sizes))

    def _priority(self, probs_VC: Tensor, token_V: Tensor, info: TokenInfo) -> Tensor:
        probs_VE = probs_VC[:, : self.num_experts]
        if self.settings.drop_policy == "position":
            return -token_V[:, None].expand_as(probs_VE)
        return selection_keys(probs_VE, info, self.key)


class TopKRouter(TokenChoiceRouter):
    """Top-k routing: every valid token takes the k experts with the highest logits. There are no null experts.

    The combine weight is the gate value, a softmax over all experts or a sigmoid, optionally renormalised over the k
    chosen experts. With `weighting: straight_through`, the combine weight is p / stop_gradient(p), where p is the gate
    value. The value of this weight is 1, and its gradient is that of log p.
    """

    settings: TopKSettings

    def __init__(self, settings: TopKSettings, site: Site):
        super().__init__(settings, site)
        self.experts_per_token = settings.top_k if settings.capacity_factor is None else None

    def probabilities(self, logits_VC: Tensor) -> Tensor:
        return super().probabilities(logits_VC) if self.settings.score == "softmax" else logits_VC.sigmoid()

    def weights(self, logits_VC: Tensor, chosen_Vk: Tensor) -> Tensor:
        log_probs_VC = logits_VC.log_softmax(dim=1) if self.settings.score == "softmax" else F.logsigmoid(logits_VC)
        log_Vk = log_probs_VC.gather(1, chosen_Vk)
        if self.settings.weighting == "straight_through":
            return (log_Vk - log_Vk.detach()).exp()
        return log_Vk.softmax(dim=1) if self.settings.renormalize else log_Vk.exp()


class NullExpertRouter(TokenChoiceRouter):
    """AdaMoE routing (arXiv 2406.13233): top-k over true and null experts, so a token takes 0 to k true experts.

    By default, the combine weights are a softmax over the chosen true experts (eq. 1). The setting `normalize_over`
    selects the columns of the softmax. If a token chose only null experts, its output is zero. Assignments to null
    experts produce no rows, so they cost neither FLOPs nor communication.
    """

    settings: NullExpertSettings

    def __init__(self, settings: NullExpertSettings, site: Site):
        super().__init__(settings, site)
        self.reference_top_k = settings.reference_top_k

    def weights(self, logits_VC: Tensor, chosen_Vk: Tensor) -> Tensor:
        true_Vk, chosen_logits_Vk = chosen_Vk < self.num_experts, logits_VC.gather(1, chosen_Vk)
        logits_Vk = chosen_logits_Vk.masked_fill(~true_Vk, -torch.inf)
        if self.settings.normalize_over == "all_true":
            return (logits_Vk - logits_VC[:, : self.num_experts].logsumexp(dim=1, keepdim=True)).exp()
        if self.settings.normalize_over == "chosen":
            return (logits_Vk - chosen_logits_Vk.logsumexp(dim=1, keepdim=True)).exp()
        highest_V1 = logits_Vk.detach().amax(dim=1, keepdim=True)
        exp_Vk = (logits_Vk - highest_V1.where(true_Vk.any(dim=1, keepdim=True), 0.0)).exp()
        total_V1 = exp_Vk.sum(dim=1, keepdim=True)
        return exp_Vk / total_V1.where(total_V1 > 0, 1.0)
