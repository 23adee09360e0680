"""Held-out loss in nats per token, over all predictions and per modality of the predicted token.

Shape suffixes: T tokens of one micro-batch, V vocabulary, M modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moe_dist.batch import MODALITIES, Batch
from moe_dist.parallel.layout import Layout

TokenLosses = Callable[[Batch], Tensor]  # [T] loss of every prediction in nats; masked ones are ignored


@torch.no_grad()
def evaluate(forward: Callable, batches: Iterable[Batch], layout: Layout) -> dict[str, float]:
    """Mean cross-entropy of a model.

    forward: Batch -> an output with logits_TV. Collective: every rank calls it with equally many batches, as
    heldout_batches gives them. Returns eval/loss, eval/loss/text and eval/loss/image; a modality never predicted has no
    key.
    """

    def token_losses(batch: Batch) -> Tensor:
        return F.cross_entropy(forward(batch).logits_TV.float(), batch.targets_T, reduction="none")

    return mean_losses(token_losses, (batch.to(layout.device) for batch in batches), layout)


def mean_losses(token_losses: TokenLosses, batches: Iterable[Batch], layout: Layout) -> dict[str, float]:
    """Mean of any per-token loss over the counted predictions of all ranks; keys as in evaluate."""
    totals = torch.zeros(2, len(MODALITIES), dtype=torch.float64, device=layout.device)  # sums, counts
    for batch in batches:
        losses_T = torch.where(batch.loss_mask_T, token_losses(batch).double(), 0.0)
        totals[0].index_add_(0, batch.target_modality_T, losses_T)
        totals[1].index_add_(0, batch.target_modality_T, batch.loss_mask_T.double())
    if layout.dp_group is not None:
        dist.all_reduce(totals, group=layout.dp_group)
    sums_M, counts_M = totals.tolist()
    means = {f"eval/loss/{name}": s / n for name, s, n in zip(MODALITIES, sums_M, counts_M, strict=True) if n}
    return {"eval/loss": sum(sums_M) / sum(counts_M), **means} if means else {}
