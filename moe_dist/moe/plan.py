"""The two values that connect routing with everything else. A leaf: imports nothing of ours.

Shape suffixes: T tokens, E routed experts (global), N assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPlan:
    """Which token goes to which expert, and with which weight: all that a dispatcher may know.

    It fixes neither k nor a capacity: a token may appear zero or more times.
    """

    token_ids_N: Tensor  # int64 index (into the T tokens) of each assignment, sorted by expert
    weights_N: Tensor  # combine weight; carries the router's gradient
    counts_E: Tensor  # int64 assignments per expert; sums to N


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRecord:
    """What a router saw and decided in one layer, for losses and telemetry. Never stored on a module."""

    layer: int
    logits_TE: Tensor  # float32; -inf where the token cannot reach the expert (other modality, padding)
    probs_TE: Tensor  # float32 gate values; 0 where it cannot
    plan: RoutingPlan
