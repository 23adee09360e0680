"""Mixture-of-depths admission rates, and how often auxiliary routers agree with their main routers.

Shape suffixes: T tokens, V tokens that a router scored, C columns of a router.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moe_dist.core.batch import MODALITIES, TokenInfo
from moe_dist.core.routing_plan import DepthRecord, Routing, RoutingRecord

Ratio = tuple[str, Tensor, Tensor]  # name, numerator, denominator: counts of this rank


def decision_counts(
    records: Sequence[RoutingRecord], depths: Sequence[DepthRecord], info: TokenInfo
) -> dict[str, Tensor]:
    """Count the decisions behind the metrics `admitted`, `auxiliary_*` and `depth_*` in one micro-batch.

    Returns a dict from metric key (metric_keys.py) to an int64 tensor [2] with the metric's numerator and denominator.
    The tensors can be summed over micro-batches and ranks before decision_metrics divides them.
    """
    counts: dict[str, Tensor] = {}
    for name, numerator, denominator in _ratios(records, depths, info):
        count = torch.stack([numerator, denominator])
        counts[name] = counts[name] + count if name in counts else count
    return counts


def decision_metrics(totals: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute each metric as its numerator divided by its denominator. Metrics whose denominator is 0 are left out.

    totals: the results of decision_counts, summed over micro-batches and ranks.
    """
    pairs = {name: total.tolist() for name, total in totals.items()}
    return {name: numerator / of for name, (numerator, of) in pairs.items() if of}


def _ratios(records: Sequence[RoutingRecord], depths: Sequence[DepthRecord], info: TokenInfo) -> Iterator[Ratio]:
    for record in records:
        for part in record.routings:
            for modality, member_V in _members(part, info).items():
                yield from _agreement(part, member_V, f"moe/{record.layer}/auxiliary_", f"/{modality}")
    for depth in depths:
        routing = depth.routing
        for modality, member_V in _members(routing, info).items():
            admitted_V = routing.kept_VE.squeeze(1) & member_V
            yield f"moe/{depth.layer}/admitted/{modality}", admitted_V.sum(), member_V.sum()
        yield from _agreement(routing, torch.ones_like(routing.token_V, dtype=torch.bool), f"moe/{depth.layer}/depth_")


def _members(part: Routing, info: TokenInfo) -> dict[str, Tensor]:
    """Return a dict from each modality to a mask of its tokens, bool [V]."""
    modality_V = info.modality_T.index_select(0, part.token_V)
    return {name: modality_V == index for index, name in enumerate(MODALITIES)}


def _agreement(part: Routing, member_V: Tensor, prefix: str, suffix: str = "") -> Iterator[Ratio]:
    """Yield the auxiliary router's accuracy, precision and recall on the tokens where member_V is true.

    A decision is made for each pair of a token and a router column. The main router's decisions are taken as correct.
    Each metric is yielded as (metric key, numerator, denominator). If there is no auxiliary router, nothing is yielded.
    prefix, suffix: the beginning and the end of the metric keys.
    """
    if part.auxiliary_VC is None:
        return
    said_VC, true_VC = (part.auxiliary_VC > 0) & member_V[:, None], part.chosen_VC & member_V[:, None]
    both = (said_VC & true_VC).sum()
    decisions = member_V.sum() * part.chosen_VC.shape[1]
    yield f"{prefix}accuracy{suffix}", decisions - (said_VC ^ true_VC).sum(), decisions
    yield f"{prefix}precision{suffix}", both, said_VC.sum()
    yield f"{prefix}recall{suffix}", both, true_VC.sum()
