"""The values that connect routing with everything else. A leaf: imports nothing of ours.

Shape suffixes: T tokens, V tokens that a router saw (the valid ones), E routed experts, C columns of a router (its E
experts, then its null experts), N assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPlan:
    """Which token goes to which expert, and with which weight: all that a dispatcher may know.

    It fixes neither k nor a capacity: a token may appear zero or more times. Assignments beyond the sum of counts_E go
    nowhere (null experts, full experts): how many there are is known on the device only, so the dispatcher cuts them
    off where it reads the counts. They become no rows.
    """

    token_ids_N: Tensor  # int64 index (into the T tokens) of each assignment, sorted by expert
    weights_N: Tensor  # combine weight; carries the router's gradient
    counts_E: Tensor  # int64 assignments per expert; sums to N at most
    complete: bool = True  # counts_E is known to sum to N


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What one router saw and decided, for losses and telemetry. Rows are the tokens token_V, and no padding."""

    token_V: Tensor  # int64 index (into the T tokens)
    logits_VC: Tensor  # float32
    probs_VC: Tensor  # float32 gate values
    chosen_VC: Tensor  # bool: what the router chose, before any expert was full
    kept_VE: Tensor  # bool: what reached its expert
    auxiliary_VC: Tensor | None = None  # float32 logits of the auxiliary router, where there is one

    @property
    def num_experts(self) -> int:
        return self.kept_VE.shape[1]

    @property
    def load_E(self) -> Tensor:
        """int64 tokens that each expert works on."""
        return self.kept_VE.sum(0)

    @property
    def dropped_E(self) -> Tensor:
        """int64 tokens that chose the expert and found it full."""
        return self.chosen_VC[:, : self.num_experts].sum(0) - self.load_E


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRecord:
    """The routing of one layer. Never stored on a module. A composite router has several parts, each over experts and
    tokens of its own; experts are numbered through."""

    layer: int
    plan: RoutingPlan
    routings: tuple[Routing, ...]

    @property
    def load_E(self) -> Tensor:
        return torch.cat([part.load_E for part in self.routings])

    @property
    def dropped_E(self) -> Tensor:
        return torch.cat([part.dropped_E for part in self.routings])

    def experts_of_T(self, num_tokens: int) -> Tensor:
        """int64 [T]: how many experts work on each token."""
        count_T = self.plan.counts_E.new_zeros(num_tokens)
        for part in self.routings:
            count_T = count_T.index_add(0, part.token_V, part.kept_VE.sum(1))
        return count_T

    def renumbered(self, token_K: Tensor) -> RoutingRecord:
        """Where the layer saw only some tokens (mixture-of-depths): token i of what it saw is token_K[i] of all."""
        parts = tuple(replace(part, token_V=token_K.index_select(0, part.token_V)) for part in self.routings)
        plan = replace(self.plan, token_ids_N=token_K.index_select(0, self.plan.token_ids_N))
        return replace(self, plan=plan, routings=parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthRecord:
    """Which tokens a layer with mixture-of-depths admitted."""

    layer: int
    routing: Routing  # of the valid tokens, with one column: the block
    document_lengths: tuple[int, ...]  # how many tokens of each document were admitted
