"""From logits to the next token: guidance, temperature, top-p, and a draw that no layout changes.

Shape suffixes: S samples, V vocabulary.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moe_dist.core.seeding import fold_key, uniform
from moe_dist.core.strict import Positive, Strict


class Sampling(Strict):
    """How tokens are drawn."""

    temperature: Annotated[float, Field(ge=0)] = 1.0  # 0: always the likeliest token
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # draw from the likeliest tokens that together reach this share
    guidance: Annotated[float, Field(ge=0, le=1e6)] = 1.0  # classifier-free, of text -> image; 1: none, 0: no caption
    seed: int = 0
    max_tokens: Positive = 256  # of a text or a mixed continuation; no image begins in one where it would not fit


def guide(logits_SV: Tensor, unconditional_SV: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598, eq. 6, with their w = scale - 1)."""
    return logits_SV + (scale - 1) * (logits_SV - unconditional_SV)


def nucleus(probs_SV: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest likeliest tokens that together reach top_p (Holtzman et al., arXiv 1904.09751, eq. 2-3).

    Not renormalised. Of equally likely tokens the one with the lower id comes first.
    """
    sorted_SV, order_SV = probs_SV.sort(dim=1, descending=True, stable=True)
    before_SV = F.pad(sorted_SV.cumsum(dim=1)[:, :-1], (1, 0))
    kept_SV = torch.zeros_like(probs_SV, dtype=torch.bool).scatter(1, order_SV, before_SV < top_p)
    return probs_SV * kept_SV


def choose(logits_SV: Tensor, allowed_SV: Tensor, sampling: Sampling, sample_S: Tensor, position_S: Tensor) -> Tensor:
    """The next token of each sample, int64 [S], one of those allowed (bool [S, V], at least one each).

    The draw depends on (seed, sample, position) alone: it inverts the cumulated probabilities in the order of the ids,
    so that rounding, which differs between layouts, moves no border by more than its own size.
    """
    logits_SV = logits_SV.double().masked_fill(~allowed_SV, -torch.inf)
    if sampling.temperature == 0:
        return logits_SV.argmax(dim=1)
    below_SV = logits_SV - logits_SV.amax(dim=1, keepdim=True)  # or a temperature near 0 divides to inf - inf
    probs_SV = nucleus((below_SV / sampling.temperature).softmax(dim=1), sampling.top_p)
    reached_SV = probs_SV.cumsum(dim=1)
    draw_S = uniform(fold_key(sampling.seed, "sampling"), sample_S, position_S)
    return torch.searchsorted(reached_SV, (draw_S * reached_SV[:, -1])[:, None], right=True)[:, 0]
