"""What a router is, and the parts routers share.

Shape suffixes: T tokens, D model width, V routed (valid) tokens, C columns of the gate: experts, then null experts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.batch import TokenInfo
from moe_dist.moe.plan import RoutingPlan, RoutingRecord
from moe_dist.moe.random import hash_ids, seeded_normal_
from moe_dist.strict import Strict

# Selection compares logits on a grid of 2^-14, so that tokens that are identical but for rounding tie at every layout.
# A key packs 24 bits of grid position (logits beyond +-512 tie) above 40 bits of hash, which breaks the ties.
_GRID = 2.0**14
_HASH_BITS = 40
_GRID_LIMIT = 2**23


class Router(Protocol):
    """A planner, an nn.Module: says which of the valid tokens of `info` go to which expert. Padding is never routed."""

    num_experts: int
    causal: bool  # False: the decision about a token looks at later tokens (expert choice)
    has_auxiliary: bool  # with TokenInfo.causal its decisions are causal all the same (moe/auxiliary.py)
    experts_per_token: int | None  # how many every valid token gets; None where that varies or may vary
    expert_groups: tuple[tuple[int, ...], ...]  # experts to be spread evenly over ranks, one tuple a modality
    reference_top_k: int | None  # experts per token that telemetry compares the FLOPs with

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
    """logits = x W^T (+ b), in float32 (float64 for float64 input) whatever the dtype of x, the weights or autocast.

    A module of its own that returns a tensor: ZeRO-3 gathers parameters with hooks on modules that return tensors.
    """

    def __init__(self, columns: int, site: Site, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(columns, site.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(columns, dtype=torch.float32)) if bias else None
        seeded_normal_(self.weight, seed=site.seed, name=f"{site.name}.gate.weight", std=site.init_std)

    def forward(self, x_VD: Tensor) -> Tensor:
        return precise_linear(x_VD, self.weight, self.bias)


def precise_linear(x_VD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """x W^T (+ b) in float32, or float64 for float64 input, whatever the other dtypes and autocast."""
    dtype = torch.promote_types(x_VD.dtype, torch.float32)
    with _no_autocast(x_VD.device.type):
        bias = None if bias_C is None else bias_C.to(dtype)
        return F.linear(x_VD.to(dtype), weight_CD.to(dtype), bias)


def _no_autocast(device_type: str) -> AbstractContextManager:
    available = torch.amp.is_autocast_available(device_type)  # not on meta
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def selection_keys(logits_VC: Tensor, token_id_V: Tensor, key: int) -> Tensor:
    """int64 [V, C], ordered like the logits on the selection grid, ties broken by a hash of (key, token, column)."""
    grid_VC = (logits_VC.detach() * _GRID).round().clamp(-_GRID_LIMIT, _GRID_LIMIT - 1).long()
    column_C = torch.arange(logits_VC.shape[1], device=logits_VC.device)
    hash_VC = hash_ids(key, token_id_V[:, None], column_C)
    return (grid_VC << _HASH_BITS) | (hash_VC & ((1 << _HASH_BITS) - 1))


def selection_margins(logits_VC: Tensor, keys_VC: Tensor, chosen_VC: Tensor) -> Tensor:
    """float64 [V, C]: by how much one logit must change until its row is chosen, or no longer chosen, in its column.

    The rows of a column compete for a fixed number of places, which those of the highest keys have (selection_keys).
    Where all rows of a column are chosen, or none, nothing can change: inf.
    """
    hash_VC = keys_VC & ((1 << _HASH_BITS) - 1)
    lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    last_in_C = keys_VC.masked_fill(~chosen_VC, highest).amin(dim=0)
    first_out_C = keys_VC.masked_fill(chosen_VC, lowest).amax(dim=0)
    rival_VC = torch.where(chosen_VC, first_out_C, last_in_C)
    # The lowest grid position above the rival: the rival's own, if the hash decides for the row, else the next one.
    position_VC = (rival_VC >> _HASH_BITS) + (hash_VC <= (rival_VC & ((1 << _HASH_BITS) - 1)))
    distance_VC = (logits_VC.detach().double() - (position_VC - 0.5) / _GRID).abs()
    return distance_VC.masked_fill(chosen_VC.all(dim=0) | ~chosen_VC.any(dim=0), torch.inf)
