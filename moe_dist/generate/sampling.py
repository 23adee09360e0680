"""Sampling of the next token from logits: guidance, temperature, top-p, and a draw that is the same in every layout.

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
    """Settings that determine how tokens are drawn."""

    temperature: Annotated[float, Field(ge=0)] = 1.0  # 0: always the most likely token
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # draw from the most likely tokens whose sum reaches this
    guidance: Annotated[float, Field(ge=0, le=1e6)] = 1.0  # classifier-free, for text -> image; 1: off, 0: no caption
    seed: int = 0
    max_tokens: Positive = 256  # of a text or mixed sample; an image only begins if it fits


def guide(logits_SV: Tensor, unconditional_SV: Tensor, scale: float) -> Tensor:
    """Return the logits of classifier-free guidance (Ho and Salimans, arXiv 2207.12598, eq. 6, where w is scale - 1).

    unconditional_SV: the logits for the same samples without their captions.
    """
    return logits_SV + (scale - 1) * (logits_SV - unconditional_SV)


def nucleus(probs_SV: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least top_p, and zero the others.

    Source: Holtzman et al., arXiv 1904.09751, eq. 2-3. The result is not renormalised. Among equally likely tokens,
    those with lower ids are kept first.
    """
    sorted_SV, order_SV = probs_SV.sort(dim=1, descending=True, stable=True)
    before_SV = F.pad(sorted_SV.cumsum(dim=1)[:, :-1], (1, 0))
    kept_SV = torch.zeros_like(probs_SV, dtype=torch.bool).scatter(1, order_SV, before_SV < top_p)
    return probs_SV * kept_SV


def choose(logits_SV: Tensor, allowed_SV: Tensor, sampling: Sampling, sample_S: Tensor, position_S: Tensor) -> Tensor:
    """Draw the next token of each sample, int64 [S].

    allowed_SV: the tokens that may be drawn (bool, at least one per sample).
    If the temperature is 0, the most likely token is chosen. Otherwise, the probabilities are added up in the order of
    the ids, and the first token at which the sum exceeds a random number is drawn. The random number depends only on
    (seed, sample, position). Rounding changes the sums only slightly, so almost always the same token is drawn in every
    layout.
    """
    logits_SV = logits_SV.double().masked_fill(~allowed_SV, -torch.inf)
    if sampling.temperature == 0:
        return logits_SV.argmax(dim=1)
    below_SV = logits_SV - logits_SV.amax(dim=1, keepdim=True)  # otherwise a temperature near 0 gives inf - inf
    probs_SV = nucleus((below_SV / sampling.temperature).softmax(dim=1), sampling.top_p)
    reached_SV = probs_SV.cumsum(dim=1)
    draw_S = uniform(fold_key(sampling.seed, "sampling"), sample_S, position_S)
    return torch.searchsorted(reached_SV, (draw_S * reached_SV[:, -1])[:, None], right=True)[:, 0]
