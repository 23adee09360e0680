"""What a router is, the parts routers share, and token choice (top-k).

Shape suffixes: T tokens, D model width, E experts of this router, V routed (valid) tokens, k experts per token,
N assignments.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from moe_dist.batch import TokenInfo
from moe_dist.config import Positive, Strict
from moe_dist.moe.plan import RoutingPlan, RoutingRecord
from moe_dist.moe.random import fold_key, hash_ids, seeded_normal_

# Selection compares logits on a grid of 2^-14, so that tokens that are identical but for rounding tie at every layout.
# A key packs 24 bits of grid position (logits beyond +-512 tie) above 40 bits of hash, which breaks the ties.
_GRID = 2.0**14
_HASH_BITS = 40
_GRID_LIMIT = 2**23


class Router(Protocol):
    """A planner, an nn.Module: says which of the valid tokens of `info` go to which expert. Padding is never routed."""

    num_experts: int
    causal: bool  # False: the decision about a token looks at later tokens (expert choice)
    expert_groups: tuple[tuple[int, ...], ...]  # experts to be spread evenly over ranks, one tuple a modality

    def __call__(self, x_TD: Tensor, info: TokenInfo) -> tuple[RoutingPlan, RoutingRecord]: ...


class RouterSettings(Strict):
    """Base of every router's settings. A composite returns its children's raw settings, which are built first."""

    def children(self) -> dict[str, dict[str, Any]]:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a router sits: everything it needs besides its settings."""

    hidden_size: int
    layer: int
    seed: int
    init_std: float
    name: str  # global parameter prefix; randomness is keyed by it

    def child(self, name: str) -> Site:
        return replace(self, name=f"{self.name}.{name}")


class Gate(nn.Module):
    """logits = x W^T, in float32 (float64 for float64 input) whatever the dtype of x, of the weights or of autocast.

    A module of its own that returns a tensor: ZeRO-3 gathers parameters with hooks on modules that return tensors.
    """

    def __init__(self, num_experts: int, site: Site):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, site.hidden_size, dtype=torch.float32))
        seeded_normal_(self.weight, seed=site.seed, name=f"{site.name}.gate.weight", std=site.init_std)

    def forward(self, x_VD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_VD.dtype, torch.float32)
        with _no_autocast(x_VD.device.type):
            return F.linear(x_VD.to(dtype), self.weight.to(dtype))


def _no_autocast(device_type: str) -> AbstractContextManager:
    available = torch.amp.is_autocast_available(device_type)  # not on meta
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def selection_keys(logits_VE: Tensor, token_id_V: Tensor, key: int) -> Tensor:
    """int64 [V, E], ordered like the logits on the selection grid, ties broken by a hash of (key, token, expert)."""
    grid_VE = (logits_VE.detach() * _GRID).round().clamp(-_GRID_LIMIT, _GRID_LIMIT - 1).long()
    expert_E = torch.arange(logits_VE.shape[1], device=logits_VE.device)
    hash_VE = hash_ids(key, token_id_V[:, None], expert_E)
    return (grid_VE << _HASH_BITS) | (hash_VE & ((1 << _HASH_BITS) - 1))


def make_record(layer: int, num_tokens: int, token_V: Tensor, logits_VE: Tensor, probs_VE: Tensor, plan: RoutingPlan):
    """Spread the routed tokens' logits and gate values over all T tokens."""
    shape = (num_tokens, logits_VE.shape[1])
    return RoutingRecord(
        layer=layer,
        logits_TE=logits_VE.new_full(shape, -torch.inf).index_copy(0, token_V, logits_VE),
        probs_TE=probs_VE.new_zeros(shape).index_copy(0, token_V, probs_VE),
        plan=plan,
    )


class TopKRouter(nn.Module):
    """Token choice: every valid token takes the k experts of its highest logits.

    The weight is the gate value, softmax over all experts or sigmoid, optionally renormalised over the k chosen.
    """

    causal = True

    class Settings(RouterSettings):
        type: Literal["top_k"]
        num_experts: Positive
        top_k: Positive
        score: Literal["softmax", "sigmoid"] = "softmax"
        renormalize: bool = False

        @model_validator(mode="after")
        def _enough_experts(self):
            if self.top_k > self.num_experts:
                raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
            return self

    def __init__(self, settings: Settings, site: Site):
        super().__init__()
        self.num_experts = settings.num_experts
        self.expert_groups = (tuple(range(settings.num_experts)),)
        self.settings, self.layer = settings, site.layer
        self.key = fold_key(site.seed, site.name, "ties")
        self.gate = Gate(settings.num_experts, site)

    def forward(self, x_TD: Tensor, info: TokenInfo) -> tuple[RoutingPlan, RoutingRecord]:
        k = self.settings.top_k
        token_V = info.by_modality_V
        logits_VE = self.gate(x_TD.index_select(0, token_V))
        probs_VE = logits_VE.softmax(dim=1) if self.settings.score == "softmax" else logits_VE.sigmoid()
        keys_VE = selection_keys(logits_VE, info.token_id_T.index_select(0, token_V), self.key)
        expert_Vk = keys_VE.topk(k, dim=1).indices
        weight_Vk = probs_VE.gather(1, expert_Vk)
        if self.settings.renormalize:
            weight_Vk = weight_Vk / weight_Vk.sum(dim=1, keepdim=True)
        order_N = expert_Vk.flatten().argsort(stable=True)
        plan = RoutingPlan(
            token_ids_N=token_V.index_select(0, order_N // k),
            weights_N=weight_Vk.flatten().index_select(0, order_N),
            counts_E=expert_Vk.new_zeros(self.num_experts).scatter_add_(
                0, expert_Vk.flatten(), torch.ones_like(expert_Vk).flatten()
            ),
        )
        return plan, make_record(self.layer, info.num_tokens, token_V, logits_VE, probs_VE, plan)
