"""Next-token cross-entropy as a sum. The objective divides the sum by the token count over all ranks and accumulation
steps.

Shape suffixes: T tokens, V vocabulary, M modalities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dist.core.batch import MODALITIES, Batch
from moe_dist.core.fused import fused, is_compiled_for
from moe_dist.core.step import ModelOutput

_CHUNK = 2**26  # number of logits converted to float32 at a time: 1,024 tokens if the vocabulary is 65,536
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class LossTerms:
    total: Tensor  # 0-d float32: nats, summed over the predictions in the loss mask
    by_modality_M: Tensor  # the same for each modality of the target, detached
    counts_M: Tensor  # int64 number of predictions of each modality


class LanguageLoss:
    """Mean next-token cross-entropy over all positions at which the loss mask is true.

    A separate mean is also reported for each modality of the target token.
    """

    names = ("loss", *(f"loss/{name}" for name in MODALITIES))

    def counts(self, batch: Batch) -> tuple[int, ...]:
        by_modality_M = torch.bincount(batch.target_modality_T[batch.loss_mask_T], minlength=len(MODALITIES)).tolist()
        return sum(by_modality_M), *by_modality_M

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, ...]:
        loss = language_loss(output.logits_TV, batch)
        return loss.total, *loss.by_modality_M


def language_loss(logits_TV: Tensor, batch: Batch) -> LossTerms:
    """Sum -log p(target) over the positions in batch.loss_mask_T, in float32 (float64 for float64 logits)."""
    targets_T = batch.targets_T.masked_fill(~batch.loss_mask_T, _IGNORED)
    loss_T = token_losses(logits_TV, targets_T)
    of_modality_MT = torch.stack([batch.loss_mask_T & (batch.target_modality_T == m) for m in range(len(MODALITIES))])
    return LossTerms(
        total=loss_T.sum(),
        by_modality_M=(loss_T.detach() * of_modality_MT).sum(dim=1),
        counts_M=of_modality_MT.sum(dim=1),
    )


def token_losses(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Return -log p(target) of each token, or 0 where the target is -100.

    Converting all half-precision logits to float32 at once would take 1 GiB for 4,096 tokens and a vocabulary of
    65,536. They are therefore converted one chunk at a time. The backward pass converts each chunk again. When compiled
    for a GPU, the function makes no float32 copy.
    """
    if logits_TV.dtype in (torch.float32, torch.float64) or is_compiled_for(logits_TV):
        return _cross_entropy(logits_TV, targets_T)
    rows = max(1, _CHUNK // logits_TV.shape[1])
    chunks = zip(logits_TV.split(rows), targets_T.split(rows))
    return torch.cat([checkpoint(_cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])


@fused
def _cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(dtype), targets_T, ignore_index=_IGNORED, reduction="none")
