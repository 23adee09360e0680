"""Expert-choice routing, either over all tokens or within each modality (MoMa, arXiv 2407.21770, eq. 1), with optional
Gumbel noise in training.

Shape suffixes: T tokens, D model width, E experts of this router, V routed tokens, K tokens that an expert takes from
all selection groups together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.config.routers import ExpertChoiceSettings, ModalitySettings
from moe_dist.core.batch import MODALITIES, TokenInfo
from moe_dist.core.routing_plan import Routing, RoutingPlan, RoutingRecord
from moe_dist.core.seeding import logistic
from moe_dist.model.moe.auxiliary_router import AuxiliaryRouter, decide_alone
from moe_dist.model.moe.capacity import expert_capacity, join_plans, plan_assignments
from moe_dist.model.moe.router import Gate, selection_keys
from moe_dist.model.site import Site


class ExpertChoiceRouter(nn.Module):
    """Router in which each expert takes the highest-scoring valid tokens of each selection group.

    A token may get 0 to E experts. If the capacity factor is 1, tokens get one expert on average. The score of a token
    is s = sigmoid(x W). The combine weight is s, not normalised over experts.

    gumbel_noise: in training, s is sigmoid(x W + G' - G''), where G' and G'' are Gumbel noise (MoMa, arXiv 2407.21770,
    section on upcycling). The noise is a function of (seed, layer, token id, expert). Token ids are unique over the
    whole run, so the noise differs in each step. It is the same in every layout and after a resume.

    If TokenInfo.causal is set, the auxiliary router decides which experts a token gets. The combine weight is still s
    (MoMa, arXiv 2407.21770, eq. 3-4).
    """

    causal = has_state = False
    experts_per_token = None
    reference_top_k = None

    def __init__(self, settings: ExpertChoiceSettings, site: Site):
        super().__init__()
        self.num_experts = settings.num_experts
        self.expert_groups = (tuple(range(settings.num_experts)),)
        self.settings, self.layer = settings, site.layer
        self.key = site.key("ties")
        self.noise_key = site.key("gumbel")
        self.gate = Gate(settings.num_experts, site)
        self.auxiliary = AuxiliaryRouter(settings.num_experts, site) if settings.auxiliary else None
        self.has_auxiliary = settings.auxiliary

    def forward(self, x_TD: Tensor, info: TokenInfo) -> tuple[RoutingPlan, RoutingRecord]:
        token_V, sizes = info.competing()
        x_VD = x_TD.index_select(0, token_V)
        logits_VE = self._add_noise(self.gate(x_VD, token_V, info), token_V, info)
        probs_VE = logits_VE.sigmoid()
        auxiliary_VE = None if self.auxiliary is None else self.auxiliary(x_VD)
        if info.causal:
            chosen_VE = decide_alone(auxiliary_VE, self.layer)
            expert_VE = torch.arange(self.num_experts, device=x_TD.device).where(chosen_VE, self.num_experts)
            plan = plan_assignments(token_V, expert_VE, probs_VE, self.num_experts)
        else:
            keys_VE = selection_keys(logits_VE, info, self.key)
            chosen_EK = self._choose(keys_VE, sizes)
            chosen_VE = torch.zeros_like(keys_VE, dtype=torch.bool).scatter(0, chosen_EK.t(), True)
            plan = RoutingPlan(
                token_ids_N=token_V.index_select(0, chosen_EK.flatten()),
                weights_N=probs_VE.t().gather(1, chosen_EK).flatten(),
                counts_E=token_V.new_full((self.num_experts,), chosen_EK.shape[1]),
            )
        routing = Routing(
            token_V=token_V,
            logits_VC=logits_VE,
            probs_VC=probs_VE,
            chosen_VC=chosen_VE,
            kept_VE=chosen_VE,
            auxiliary_VC=auxiliary_VE,
        )
        return plan, RoutingRecord(layer=self.layer, plan=plan, routings=(routing,))

    def _add_noise(self, logits_VE: Tensor, token_V: Tensor, info: TokenInfo) -> Tensor:
        """Add Gumbel noise to the logits in training if `gumbel_noise` is set.

        If the gate is frozen, no noise is added. The stage that trains auxiliary routers freezes it.
        """
        trained = any(parameter.requires_grad for parameter in self.gate.parameters())
        if not (self.settings.gumbel_noise and self.training and trained):
            return logits_VE
        token_id_V = info.token_id_T.index_select(0, token_V)
        expert_E = torch.arange(self.num_experts, device=logits_VE.device)
        return logits_VE + logistic(self.noise_key, token_id_V[:, None], expert_E).to(logits_VE.dtype)

    def _choose(self, keys_VE: Tensor, group_sizes: list[int]) -> Tensor:
        """Return the rows that each expert takes: in each group, those with the highest keys for the expert.

        The result is int64 [E, K], indices into the V rows of keys_VE.
        """
        chosen, start = [], 0
        for size, keys_bE in zip(group_sizes, keys_VE.split(group_sizes)):
            capacity = expert_capacity(size, self.settings.capacity_factor, self.num_experts)
            first = keys_bE.t().topk(capacity, dim=1, sorted=False).indices
            chosen.append(first + start if start else first)
            start += size
        return torch.cat(chosen, dim=1) if len(chosen) > 1 else chosen[0]


class ModalityRouter(nn.Module):
    """Composite router for modality-aware routing: each modality has its own child router with its own experts.

    The experts of all modalities are numbered consecutively, text first. A child sees the tokens of other modalities as
    padding, so any router class can be a child.
    """

    reference_top_k = None

    def __init__(self, settings: ModalitySettings, site: Site, **children: Any):
        super().__init__()
        self.layer = site.layer
        for name, child in children.items():
            self.add_module(name, child)
        self.num_experts = sum(child.num_experts for child in children.values())
        self.causal = all(child.causal for child in children.values())
        self.has_auxiliary = all(child.causal or child.has_auxiliary for child in children.values())
        self.has_state = any(child.has_state for child in children.values())
        counts = {child.experts_per_token for child in children.values()}
        self.experts_per_token = counts.pop() if len(counts) == 1 else None
        groups, offset = [], 0
        for child in children.values():
            groups += [tuple(expert + offset for expert in group) for group in child.expert_groups]
            offset += child.num_experts
        self.expert_groups = tuple(groups)

    def forward(self, x_TD: Tensor, info: TokenInfo) -> tuple[RoutingPlan, RoutingRecord]:
        routed = [getattr(self, name)(x_TD, info.of_modality(index)) for index, name in enumerate(MODALITIES)]
        plans, records = zip(*routed)
        plan = join_plans(plans)
        parts = tuple(part for record in records for part in record.routings)
        return plan, RoutingRecord(layer=self.layer, plan=plan, routings=parts)

    def after_step(self, load_E: Tensor) -> None:
        """Update each stateful child with the load of the child's own experts."""
        children = [getattr(self, name) for name in MODALITIES]
        for child, of_child_E in zip(children, load_E.split([child.num_experts for child in children]), strict=True):
            if child.has_state:
                child.after_step(of_child_E)
