"""The router interface, and the parts that routers share: gates, selection keys and margins.

Shape suffixes: T tokens, D model width, V routed (valid) tokens, C columns of the gate (experts, then null experts).
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
from moe_dist.core.initial_values import constant_
from moe_dist.core.routing_plan import RoutingPlan, RoutingRecord
from moe_dist.core.seeding import hash_ids
from moe_dist.model.lora import LowRank
from moe_dist.model.site import Site

# Selection compares logits rounded to multiples of 2^-14 (the grid), so logits that differ only by rounding errors tie
# in every layout. The high bits of a key are the grid position (logits beyond +-256 tie). The low 40 bits are a hash,
# which breaks ties. The last bit of a float32 between 512 and 1024 is worth 2^-14, so adding 768 to a logit rounds it
# to the grid and leaves the grid position in the low bits of the sum. In float64, adding 1.5 * 2^38 does the same.
_HASH_BITS = 40
_LIMIT, _STEP = 256.0, 2.0**-14
_MIDDLE = {torch.float32: (768.0, torch.int32), torch.float64: (1.5 * 2.0**38, torch.int64)}
_ZERO = {torch.float32: 2**22, torch.float64: 0}  # grid position of logit 0 in a key
_COLUMN_STEP = 0x9E3779B97F4B  # odd; its multiples, one per column, differ in many bits


class Router(Protocol):
    """Interface for routers. A router is an nn.Module that decides which experts process each valid token.

    Padding is never routed.
    """

    layer: int
    num_experts: int
    causal: bool  # False: the decision about a token depends on later tokens (expert choice)
    has_auxiliary: bool  # with TokenInfo.causal, decisions are causal (model/moe/auxiliary_router.py)
    experts_per_token: int | None  # number of experts of every valid token; None if it can vary
    expert_groups: tuple[tuple[int, ...], ...]  # experts to spread evenly over ranks, one tuple per modality
    reference_top_k: int | None  # experts per token of the model that telemetry compares FLOPs with
    has_state: bool  # True for a StatefulRouter

    def __call__(self, x_TD: Tensor, info: TokenInfo) -> tuple[RoutingPlan, RoutingRecord]: ...


class StatefulRouter(Router, Protocol):
    """Interface for routers whose state changes between optimizer steps.

    The state is stored in buffers, so checkpoints include it.
    """

    def after_step(self, load_E: Tensor) -> None:
        """Update the state after an optimizer step.

        All ranks call this method with equal arguments. It is not called after a skipped step.
        load_E: int64 on the device, the number of tokens that each expert processed in the step, summed over
        micro-batches and data-parallel ranks, without padding.
        """
        ...


class RouterPart(nn.Module):
    """Base class of the parts of a router that hold parameters.

    A part reports its matrix products and its number of parameters.
    """

    detached = False  # True if the part's input is detached: no gradient flows further back

    def products(self, tokens: int) -> list[Product]:
        """Return the matrix products that the part computes. tokens: the number of routed tokens."""
        raise NotImplementedError

    def num_parameters(self) -> int:
        raise NotImplementedError


class Gate(RouterPart):
    """Linear layer that computes the logits of a router: x W^T (+ b).

    The logits are computed in float32 (float64 for float64 input), independently of the weight dtype and autocast. The
    gate can have a LoRA delta (`router` in LORA_TARGETS). The weight and the bias are then frozen.

    ZeRO-3 gathers parameters with hooks. These hooks need a module that returns a tensor. A router returns dataclasses,
    so the gate is a separate module.
    """

    def __init__(self, columns: int, site: Site, *, bias: bool = False):
        """Create the gate. site: the router's place in the model.

        The router must store the gate in an attribute named `gate`, because the initial values are drawn for the
        parameter name gate.weight.
        """
        super().__init__()
        self.width, self.columns = site.hidden_size, columns
        lora = site.lora if site.lora is not None and site.lora.has("router") else None
        self.lora = None if lora is None else LowRank(self.width, columns, lora, site.child("gate").child("lora"))
        self.weight = nn.Parameter(torch.empty(columns, site.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(columns, dtype=torch.float32)) if bias else None
        if self.bias is not None:
            constant_(self.bias, 0.0)
        site.draw(self.weight, "gate.weight")
        for parameter in self.parameters(recurse=False) if lora else ():
            parameter.requires_grad_(False)

    def forward(self, x_VD: Tensor, token_V: Tensor, info: TokenInfo) -> Tensor:
        """Return the logits [V, C]. token_V: the index of each row among the tokens of `info`."""
        logits_VC = precise_linear(x_VD, self.weight, self.bias)
        if self.lora is None:
            return logits_VC
        token_id_V = info.token_id_T.index_select(0, token_V) if self.training and self.lora.rate else None
        delta_VC: Tensor = self.lora(self.lora.drop(x_VD, token_id_V), _precise_product)
        return logits_VC + delta_VC

    def products(self, tokens: int) -> list[Product]:
        own = tuple(self.parameters(recurse=False))
        base = Product(self.width * self.columns * tokens, own, beside_lora=self.lora is not None)
        if self.lora is None:
            return [base]
        return [base, Product(self.lora.num_weights * tokens, tuple(self.lora.parameters()))]

    def num_parameters(self) -> int:
        deltas = 0 if self.lora is None else self.lora.num_weights
        return self.columns * (self.width + (self.bias is not None)) + deltas


def router_products(router: nn.Module, scored: Sequence[int], *, detached: bool = False) -> list[list[Product]]:
    """Return the matrix products of a router's parts, one list per part.

    detached: true selects the parts whose input is detached, and false selects all other parts.
    scored: the number of tokens that each child router scored (one number for a router without children). If `scored`
    is empty, the result is empty.
    """
    planners = zip(planning_routers(router), scored, strict=True) if scored else ()
    parts = [(part, tokens) for planner, tokens in planners for part in _parts_of(planner)]
    return [part.products(tokens) for part, tokens in parts if part.detached == detached]


def router_parameters(router: nn.Module) -> int:
    """Return the number of parameters of a router, including its children."""
    return sum(part.num_parameters() for part in _parts_of(router))


def planning_routers(router: nn.Module) -> list[nn.Module]:
    """Return the routers that produce the Routings of a RoutingRecord, in the same order.

    These are the router's children, or the router itself if it has none.
    """
    children = [child for child in router.children() if hasattr(child, "expert_groups")]
    return [planner for child in children for planner in planning_routers(child)] or [router]


def _parts_of(router: nn.Module) -> Iterator[RouterPart]:
    return (module for module in router.modules() if isinstance(module, RouterPart))


def precise_linear(x_VD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Compute x W^T (+ b) in float32 (float64 for float64 input), independently of the weight dtype and autocast."""
    dtype = torch.promote_types(x_VD.dtype, torch.float32)
    with _no_autocast(x_VD.device.type):
        bias = None if bias_C is None else bias_C.to(dtype)
        return F.linear(x_VD.to(dtype), weight_CD.to(dtype), bias)


def _precise_product(x_VD: Tensor, weight_DC: Tensor) -> Tensor:
    """Compute x W as precisely as `precise_linear`."""
    return precise_linear(x_VD, weight_DC.t())


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    available = torch.amp.is_autocast_available(device_type)  # not on meta
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def selection_keys(logits_VC: Tensor, info: TokenInfo, key: int, scope: str = "group") -> Tensor:
    """Return int64 selection keys [V, C]. A router selects the tokens or columns with the highest selection keys.

    The logits are rounded to multiples of 2^-14. A higher rounded logit has a higher key. Between equal rounded logits,
    a hash of (key, token id, column) decides. Except for the rounding, all arithmetic is on integers, so every device
    computes the same bits.
    key: the seed of the hash. scope: says which tokens compete. The rows must be the tokens that
    TokenInfo.competing(scope) returns, in this order.
    """
    middle, integer = _MIDDLE[logits_VC.dtype]
    sum_VC = (logits_VC.detach() + middle).clamp(middle - _LIMIT, middle + _LIMIT - _STEP)
    hash_VC = (_ids(info, logits_VC.shape[1], scope) * (key | 1)) >> (64 - _HASH_BITS)
    # The bits of the sum above the grid position are shifted out: int64 arithmetic wraps around.
    return hash_VC.add(sum_VC.view(integer), alpha=1 << _HASH_BITS)


def _ids(info: TokenInfo, columns: int, scope: str) -> Tensor:
    """Return a pseudo-random number for every pair of a token and a column, int64 [V, C].

    All routers that see the same tokens share these numbers. From them, selection_keys computes a different hash for
    each router: it multiplies them by the router's own odd integer, and keeps the high bits of the product. The hash is
    described in Dietzfelbinger et al., "A Reliable Randomized Algorithm for the Closest-Pair Problem", J. Algorithms
    1997.
    scope: as in selection_keys.
    """

    def make() -> Tensor:
        hash_T = info.once_per_token("hash_T", lambda: hash_ids(0, info.token_id_T))
        column_C = torch.arange(0, columns * _COLUMN_STEP, _COLUMN_STEP, device=hash_T.device)
        return hash_T.index_select(0, info.competing(scope)[0])[:, None] ^ column_C

    return info.once(("ids", columns, scope), make)


def selection_margins(logits_VC: Tensor, keys_VC: Tensor, chosen_VC: Tensor) -> Tensor:
    """Return how far each logit must move to change whether its row is chosen, float64 [V, C].

    In each column, a fixed number of rows is chosen: the rows with the highest selection keys. If a column has no
    chosen row, or only chosen rows, no choice can change, and the result is inf.
    keys_VC: the result of `selection_keys`. chosen_VC: true where a row is chosen.
    """
    lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    last_in_C = keys_VC.masked_fill(~chosen_VC, highest).amin(dim=0)
    first_out_C = keys_VC.masked_fill(chosen_VC, lowest).amax(dim=0)
    rival_VC = torch.where(chosen_VC, first_out_C, last_in_C)
    (_, hash_VC), (position_VC, rival_hash_VC) = _parts(keys_VC), _parts(rival_VC)
    # The lowest grid position that beats the rival: the rival's own if the row's hash is higher, else the next one.
    position_VC = position_VC + (hash_VC <= rival_hash_VC) - _ZERO[logits_VC.dtype]
    distance_VC = (logits_VC.detach().double() - (position_VC - 0.5) * _STEP).abs()
    return distance_VC.masked_fill(chosen_VC.all(dim=0) | ~chosen_VC.any(dim=0), torch.inf)


def _parts(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Split selection keys into the rounded logits (as positions on the grid) and the signed hashes that break ties."""
    position = (keys + (1 << (_HASH_BITS - 1))) >> _HASH_BITS
    return position, keys - (position << _HASH_BITS)
