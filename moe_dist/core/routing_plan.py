"""Results of routing, which are read by dispatchers, losses and metrics. Imports nothing from moe_dist.

Shape suffixes: T tokens, V tokens that a router saw (the valid ones), E routed experts, C columns of a router (its E
experts, then its null experts), N assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPlan:
    """Assignments of tokens to experts, with combine weights: everything that a dispatcher needs.

    There is no fixed k or capacity: a token may have any number of assignments. Only the first sum(counts_E)
    assignments have an expert. In the rest, the token chose a null expert or an expert that was full. The dispatcher
    cuts off the rest, because it is the first to read counts_E on the host.
    """

    token_ids_N: Tensor  # int64 index (into the T tokens) of each assignment, sorted by expert
    weights_N: Tensor  # combine weights, with the router's gradient
    counts_E: Tensor  # int64 assignments per expert; sums to N at most
    complete: bool = True  # True if counts_E is known to sum to N


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Logits and decisions of one router, for losses and telemetry.

    Row i of each tensor [V, ...] belongs to the token with index token_V[i]. Padding is not included.
    """

    token_V: Tensor  # int64 index (into the T tokens)
    logits_VC: Tensor  # float32
    probs_VC: Tensor  # float32 gate values
    chosen_VC: Tensor  # bool: chosen by the router, before full experts drop tokens
    kept_VE: Tensor  # bool: chosen and not dropped
    auxiliary_VC: Tensor | None = None  # float32 logits of the auxiliary router, if there is one

    @property
    def num_experts(self) -> int:
        return self.kept_VE.shape[1]

    @property
    def load_E(self) -> Tensor:
        """The number of tokens that each expert processes, int64."""
        return self.kept_VE.sum(0)

    @property
    def dropped_E(self) -> Tensor:
        """The number of tokens that each expert dropped because it was full, int64."""
        return self.chosen_VC[:, : self.num_experts].sum(0) - self.load_E


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRecord:
    """The routing of one layer in one forward pass. A record is returned by the layer, never stored on a module.

    A composite router has one Routing per child router, each with its own experts and tokens. The experts of all child
    routers are numbered consecutively.
    """

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
        """Return the number of experts that process each token, int64 [T]."""
        count_T = self.plan.counts_E.new_zeros(num_tokens)
        for part in self.routings:
            count_T = count_T.index_add(0, part.token_V, part.kept_VE.sum(1))
        return count_T

    def renumbered(self, token_K: Tensor) -> RoutingRecord:
        """Convert a record about selected tokens (mixture-of-depths) to one about all tokens.

        token_K: the index of each selected token among all tokens.
        """
        parts = tuple(replace(part, token_V=token_K.index_select(0, part.token_V)) for part in self.routings)
        plan = replace(self.plan, token_ids_N=token_K.index_select(0, self.plan.token_ids_N))
        return replace(self, plan=plan, routings=parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthRecord:
    """The tokens that were admitted by a layer with mixture-of-depths."""

    layer: int
    routing: Routing  # of the valid tokens; its one column is the block
    document_lengths: tuple[int, ...]  # number of admitted tokens of each document
