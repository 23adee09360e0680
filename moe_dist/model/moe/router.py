"""What a router is, and the parts routers share.

Shape suffixes: T tokens, D model width, V routed (valid) tokens, C columns of the gate: experts, then null experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.core.batch import TokenInfo
from moe_dist.core.costs import Product
from moe_dist.core.routing_plan import RoutingPlan, RoutingRecord
from moe_dist.core.seeding import hash_ids
from moe_dist.model.site import Site

# Selection compares logits on a grid of 2^-14, so that tokens that are identical but for rounding tie at every layout.
# A key packs the position on the grid (logits beyond +-256 tie) above 40 bits of hash, which break the ties. The last
# bit of a float32 between 512 and 1024 is worth 2^-14: adding 768 rounds a logit to the grid. Its position is in the
# low bits of the sum. float64 does the same at 1.5 * 2^38.
_HASH_BITS = 40
_LIMIT, _STEP = 256.0, 2.0**-14
_MIDDLE = {torch.float32: (768.0, torch.int32), torch.float64: (1.5 * 2.0**38, torch.int64)}
_ZERO = {torch.float32: 2**22, torch.float64: 0}  # the position of logit 0 in a key
_COLUMN_STEP = 0x9E3779B97F4B  # odd; the columns' multiples of it differ in many bits


class Router(Protocol):
    """A planner, an nn.Module: says which of the valid tokens of `info` go to which expert. Padding is never routed."""

    layer: int
    num_experts: int
    causal: bool  # False: the decision about a token looks at later tokens (expert choice)
    has_auxiliary: bool  # with TokenInfo.causal its decisions are causal all the same (model/moe/auxiliary_router.py)
    experts_per_token: int | None  # how many every valid token gets; None where that varies or may vary
    expert_groups: tuple[tuple[int, ...], ...]  # experts to be spread evenly over ranks, one tuple a modality
    reference_top_k: int | None  # experts per token that telemetry compares the FLOPs with
    has_state: bool  # it is a StatefulRouter

    def __call__(self, x_TD: Tensor, info: TokenInfo) -> tuple[RoutingPlan, RoutingRecord]: ...


class StatefulRouter(Router, Protocol):
    """A router that changes between optimizer steps. Its state is in buffers, so checkpoints hold it."""

    def after_step(self, load_E: Tensor) -> None:
        """Update the state. Called after every optimizer step that was applied, with equal arguments on all ranks.

        load_E: int64 tokens that each expert worked on, over all micro-batches and data-parallel ranks of the step,
        padding left out; on the device.
        """
        ...


class RouterPart(nn.Module):
    """A part of a router that has its parameters, and states what they cost."""

    detached = False  # its input is: no gradient goes further back

    def products(self, tokens: int) -> list[Product]:
        """Products for this number of routed tokens."""
        raise NotImplementedError

    def num_parameters(self) -> int:
        raise NotImplementedError


class Gate(RouterPart):
    """logits = x W^T (+ b), in float32 (float64 for float64 input) whatever the dtype of x, the weights or autocast.

    A module of its own that returns a tensor: ZeRO-3 gathers parameters with hooks on modules that return tensors.
    """

    def __init__(self, columns: int, site: Site, *, bias: bool = False):
        """site: the router's, which has it as `gate`."""
        super().__init__()
        self.width, self.columns = site.hidden_size, columns
        self.weight = nn.Parameter(torch.empty(columns, site.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(columns, dtype=torch.float32)) if bias else None
        site.draw(self.weight, "gate.weight")

    def forward(self, x_VD: Tensor) -> Tensor:
        return precise_linear(x_VD, self.weight, self.bias)

    def products(self, tokens: int) -> list[Product]:
        return [Product(self.width * self.columns * tokens, tuple(self.parameters()))]

    def num_parameters(self) -> int:
        return self.columns * (self.width + (self.bias is not None))


def router_products(router: nn.Module, scored: Sequence[int], *, detached: bool = False) -> list[list[Product]]:
    """Return the products of each part of a router that is detached, or of each that is not.

    scored: how many tokens each routing of its record is about; without them there are no products.
    """
    planners = zip(_planners(router), scored, strict=True) if scored else ()
    parts = [(part, tokens) for planner, tokens in planners for part in _parts_of(planner)]
    return [part.products(tokens) for part, tokens in parts if part.detached == detached]


def router_parameters(router: nn.Module) -> int:
    """Return the number of parameters of a router, children included."""
    return sum(part.num_parameters() for part in _parts_of(router))


def _planners(router: nn.Module) -> list[nn.Module]:
    """Return the routers that make a record's routings, in order: a composite's children, or the router itself."""
    children = [child for child in router.children() if hasattr(child, "expert_groups")]
    return [planner for child in children for planner in _planners(child)] or [router]


def _parts_of(router: nn.Module) -> Iterator[RouterPart]:
    return (module for module in router.modules() if isinstance(module, RouterPart))


def precise_linear(x_VD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """x W^T (+ b) in float32, or float64 for float64 input, whatever the other dtypes and autocast."""
    dtype = torch.promote_types(x_VD.dtype, torch.float32)
    with _no_autocast(x_VD.device.type):
        bias = None if bias_C is None else bias_C.to(dtype)
        return F.linear(x_VD.to(dtype), weight_CD.to(dtype), bias)


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    available = torch.amp.is_autocast_available(device_type)  # not on meta
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def selection_keys(logits_VC: Tensor, info: TokenInfo, key: int, scope: str = "group") -> Tensor:
    """Return int64 [V, C], ordered like the logits of the tokens info.competing(scope) on the selection grid.

    Ties are broken by a hash of (key, token id, column). All but one rounding is integer arithmetic, so every device
    computes the same bits.
    """
    middle, integer = _MIDDLE[logits_VC.dtype]
    sum_VC = (logits_VC.detach() + middle).clamp(middle - _LIMIT, middle + _LIMIT - _STEP)
    hash_VC = (_ids(info, logits_VC.shape[1], scope) * (key | 1)) >> (64 - _HASH_BITS)
    # What lies above the position's bits in the sum is shifted out: int64 arithmetic wraps around.
    return hash_VC.add(sum_VC.view(integer), alpha=1 << _HASH_BITS)


def _ids(info: TokenInfo, columns: int, scope: str) -> Tensor:
    """Return a well-mixed int64 [V, C] of every (token, column), shared by the routers that see the same tokens.

    A router multiplies it by an odd number of its own; the high bits of the product are a hash (Dietzfelbinger et al.,
    "A Reliable Randomized Algorithm for the Closest-Pair Problem", J. Algorithms 1997).
    """

    def make() -> Tensor:
        hash_T = info.once_per_token("hash_T", lambda: hash_ids(0, info.token_id_T))
        column_C = torch.arange(0, columns * _COLUMN_STEP, _COLUMN_STEP, device=hash_T.device)
        return hash_T.index_select(0, info.competing(scope)[0])[:, None] ^ column_C

    return info.once(("ids", columns, scope), make)


def selection_margins(logits_VC: Tensor, keys_VC: Tensor, chosen_VC: Tensor) -> Tensor:
    """Return float64 [V, C]: how far one logit must move to reverse whether its row is chosen in its column.

    The rows of a column compete for a fixed number of places, which those of the highest keys have (selection_keys).
    Where all rows of a column are chosen, or none, nothing can change: inf.
    """
    lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    last_in_C = keys_VC.masked_fill(~chosen_VC, highest).amin(dim=0)
    first_out_C = keys_VC.masked_fill(chosen_VC, lowest).amax(dim=0)
    rival_VC = torch.where(chosen_VC, first_out_C, last_in_C)
    (_, hash_VC), (position_VC, rival_hash_VC) = _parts(keys_VC), _parts(rival_VC)
    # The lowest grid position above the rival: the rival's own, if the hash decides for the row, else the next one.
    position_VC = position_VC + (hash_VC <= rival_hash_VC) - _ZERO[logits_VC.dtype]
    distance_VC = (logits_VC.detach().double() - (position_VC - 0.5) * _STEP).abs()
    return distance_VC.masked_fill(chosen_VC.all(dim=0) | ~chosen_VC.any(dim=0), torch.inf)


def _parts(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Split selection keys into the position on the grid and the (signed) hash."""
    position = (keys + (1 << (_HASH_BITS - 1))) >> _HASH_BITS
    return position, keys - (position << _HASH_BITS)
