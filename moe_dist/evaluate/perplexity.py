"""Held-out loss in nats per token: over all predictions, per modality of the target, and per domain.

This file also computes the accuracy: the fraction of predictions whose target is the most likely token. The accuracy
and the loss over all predictions have 95 % confidence intervals over documents.

Shape suffixes: T tokens of a micro-batch, V vocabulary, N documents of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.core.batch import MODALITIES, Batch
from moe_dist.evaluate.intervals import DocumentSums
from moe_dist.losses import language
from moe_dist.parallel.layout import Layout

TokenLosses = Callable[[Batch], Tensor]  # [T] loss of every prediction in nats; masked predictions are ignored


@torch.no_grad()
def evaluate(
    forward: Callable, batches: Iterable[Batch], layout: Layout, domains: Sequence[str] = ()
) -> dict[str, float]:
    """Measure a model's mean cross-entropy in nats per token, and its accuracy.

    Collective: every rank must call it with the same number of batches, as held_out_batches ensures.

    Returns eval/loss, eval/loss/text, eval/loss/image, eval/loss/domain/NAME, eval/accuracy, and the intervals of
    eval/loss and eval/accuracy (KEY/low, KEY/high). A key is left out if there are no predictions to average. The
    intervals are left out if there are fewer than two documents.
    forward: Batch -> an output with logits_TV. domains: the names of the domains, indexed by the batches' domain_T;
    empty if the data have no domains.
    """
    moments = torch.zeros(2, 6, dtype=torch.float64, device=layout.device)

    def of_batch(batch: Batch) -> Tensor:
        logits_TV = forward(batch).logits_TV
        losses_T = language.token_losses(logits_TV, batch.targets_T)
        hits_T = logits_TV.argmax(dim=1) == batch.targets_T
        moments.add_(torch.stack([_moments(values_T, batch) for values_T in (losses_T, hits_T)]))
        return losses_T

    means = mean_losses(of_batch, (batch.to(layout.device) for batch in batches), layout, domains)
    if layout.dp_group is not None:
        dist.all_reduce(moments, group=layout.dp_group)
    return means | _intervals(*(DocumentSums(*row) for row in moments.tolist()))


def _moments(values_T: Tensor, batch: Batch) -> Tensor:
    """Return the fields of DocumentSums, float64 [6], for the values of a micro-batch's predictions.

    A document that is cut into several pieces counts as several documents.
    """
    of_token_T2 = torch.stack([values_T.double(), torch.ones_like(values_T, dtype=torch.float64)], dim=1)
    of_token_T2 = torch.where(batch.loss_mask_T[:, None], of_token_T2, 0.0)
    of_document_N2 = of_token_T2.new_zeros(len(batch.info.document_lengths), 2)
    x_N, n_N = of_document_N2.index_add_(0, batch.info.document_T, of_token_T2).unbind(1)
    return torch.stack([(n_N > 0).sum(), x_N.sum(), n_N.sum(), (x_N * x_N).sum(), (x_N * n_N).sum(), (n_N * n_N).sum()])


def _intervals(loss: DocumentSums, hits: DocumentSums) -> dict[str, float]:
    if not hits.predictions:
        return {}
    found = {"eval/accuracy": hits.mean}
    if hits.documents > 1:
        for key, (low, high) in {"eval/loss": loss.interval(), "eval/accuracy": hits.share_interval()}.items():
            found |= {f"{key}/low": low, f"{key}/high": high}
    return found


def mean_losses(
    token_losses: TokenLosses, batches: Iterable[Batch], layout: Layout, domains: Sequence[str] = ()
) -> dict[str, float]:
    """Return the mean of a per-token loss over the unmasked predictions of all ranks. Collective.

    token_losses: a function that returns the loss of each prediction of a batch, [T]. The argument `domains` and the
    returned keys are as in `evaluate`.
    """
    names = [*(f"eval/loss/{name}" for name in MODALITIES), *(f"eval/loss/domain/{name}" for name in domains)]
    # One row per name: sum, count. The last row is for predictions without a domain.
    totals = torch.zeros(len(names) + 1, 2, dtype=torch.float64, device=layout.device)
    for batch in batches:
        losses_T = torch.where(batch.loss_mask_T, token_losses(batch).double(), 0.0)
        counted_T2 = torch.stack([losses_T, batch.loss_mask_T.double()], dim=1)
        totals.index_add_(0, batch.target_modality_T, counted_T2)
        if domains:
            domain_T = batch.sidecar["domain_T"]
            totals.index_add_(0, torch.where(domain_T < 0, len(names), domain_T + len(MODALITIES)), counted_T2)
    if layout.dp_group is not None:
        dist.all_reduce(totals, group=layout.dp_group)
    rows = totals.tolist()
    means = {name: total / count for name, (total, count) in zip(names, rows) if count}
    totals_of_modalities = rows[: len(MODALITIES)]
    count = sum(count for _, count in totals_of_modalities)
    return {"eval/loss": sum(total for total, _ in totals_of_modalities) / count, **means} if count else {}
