"""The neighbours whose routing each sample should imitate: the k nearest samples that the model answered correctly.

The weight W_ij of neighbour j for sample i is taken from RoMA: Routing Manifold Alignment, 2025.

  W_ij = sim(i, j) / (sum of sim(i, l) over l in N(i))   with   sim(i, j) = exp(-||E_i - E_j||^2 / (2 sigma^2))

The success set contains the samples that were answered correctly. N(i) contains the k samples of the success set that
are nearest to sample i. E_i is the embedding of sample i's question.

Shape suffixes: N samples, C samples in the success set, B samples in a block, E embedding size, K neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.core.errors import UserError
from moe_dist.data.stream.neighbour_store import Neighbours

BLOCK = 1024  # samples whose distances to the success set are in memory at once


def nearest(embedding_NE: Tensor, right_N: Tensor, *, k: int, sigma: float | None) -> tuple[Neighbours, float]:
    """Find the k nearest neighbours of every sample in the success set. Returns the neighbours and the sigma used.

    A sample is never its own neighbour. If a sample has fewer than k neighbours, its remaining entries have weight 0.
    right_N: true for the samples in the success set.
    sigma: if None, the median distance between samples and their neighbours is used.
    Raises UserError if the success set is empty, or if k or sigma is not positive.
    """
    if k < 1:
        raise UserError(f"k={k}: a sample needs at least one neighbour")
    if sigma is not None and not sigma > 0:
        raise UserError(f"sigma={sigma} is not positive")
    candidate_C = right_N.nonzero().squeeze(1)
    if not len(candidate_C):
        raise UserError(f"the success set is empty: none of {len(right_N)} samples was answered correctly")
    found = [_nearest_of(block_B, embedding_NE, candidate_C, k) for block_B in torch.arange(len(right_N)).split(BLOCK)]
    neighbour_NK, squared_NK = (torch.cat(parts) for parts in zip(*found, strict=True))
    exists_NK = squared_NK.isfinite()
    if sigma is None:
        squared = squared_NK[exists_NK]
        median = float(squared.median().sqrt()) if len(squared) else 0.0
        sigma = median or 1.0  # all questions are equal: any sigma will do
    # The softmax equals W_ij but does not underflow if all neighbours are far away.
    weight_NK = (-squared_NK / (2 * sigma**2)).softmax(dim=1).where(exists_NK, 0.0)
    return Neighbours(neighbour_NK=neighbour_NK, weight_NK=weight_NK), sigma


def _nearest_of(block_B: Tensor, embedding_NE: Tensor, candidate_C: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest candidates of each sample in a block. Return their indices and squared distances, [B, K].

    A sample is not a candidate for itself. If a sample has fewer than k candidates, its remaining entries have an
    infinite distance.
    block_B: indices of the samples in the block. candidate_C: indices of the candidates.
    """
    # Compute the distances without a matrix product, which would give equal questions a distance other than 0.
    mode = "donot_use_mm_for_euclid_dist"
    distance_BC = torch.cdist(embedding_NE[block_B], embedding_NE[candidate_C], compute_mode=mode)
    distance_BC = distance_BC.masked_fill(block_B[:, None] == candidate_C, torch.inf)
    squared_BK, index_BK = distance_BC.square().topk(min(k, len(candidate_C)), dim=1, largest=False)
    missing = k - squared_BK.shape[1]
    neighbour_BK = F.pad(candidate_C[index_BK], (0, missing))
    return neighbour_BK, F.pad(squared_BK, (0, missing), value=torch.inf)
