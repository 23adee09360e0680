"""RoMA's manifold term: route a sample like its nearest neighbours among the samples that the model answers correctly.

Shape suffixes: T tokens, V tokens that a router saw, C columns of a router, S samples of a micro-batch, K neighbours of
a sample, R routing values of a sample (one for each router column of the layers used).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config.losses import ManifoldSettings
from moe_dist.core.batch import Batch
from moe_dist.core.errors import UserError
from moe_dist.core.routing_plan import Routing, RoutingRecord
from moe_dist.core.step import ModelOutput
from moe_dist.losses.term import Context


class Manifold:
    """RoMA's loss: mean_i sum_j W_ij ||r_i - r_j||^2.

    Source: Routing Manifold Alignment, 2025, the equation that defines L_manifold. The vector r_i is the routing of
    sample i's last prompt token in the last `last_layers` expert layers. For each neighbour j, r_j and W_ij are
    constants that data.neighbours adds to the batch (data/stream/neighbour_store.py). If the store has only the mean
    and the spread of the neighbours' routing, the loss is computed from these. The loss and its gradients are the same
    as with the individual neighbours. If a sample has no neighbours, all its weights are 0 and it is left out of the
    mean. The metric manifold/coverage is the fraction of samples that have neighbours.
    """

    names = ("loss/manifold", "manifold/coverage")

    def __init__(self, settings: ManifoldSettings, context: Context):
        self.layers = settings.last_layers

    def counts(self, batch: Batch) -> tuple[int, ...]:
        if "neighbour_weights_SK" not in batch.sidecar:
            raise UserError("losses.manifold needs the neighbours of every sample: set data.neighbours")
        covered_S = _covered(batch)
        return int(covered_S.sum()), len(covered_S)

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, ...]:
        records = output.records[-self.layers :]
        if len(records) < self.layers:
            raise UserError(f"losses.manifold.last_layers={self.layers}, the model has {len(records)} expert layers")
        routing_SR = sample_routing(records, batch.sidecar["prompt_end_S"], batch.info.num_tokens)
        stored_SKR = batch.sidecar["neighbour_routing_SKR"]
        if stored_SKR.shape[-1] < routing_SR.shape[1]:
            raise UserError(
                f"data.neighbours holds {stored_SKR.shape[-1]} routing values of each sample, but the last "
                f"{self.layers} expert layers of this model have {routing_SR.shape[1]} columns"
            )
        neighbours_SKR = stored_SKR[..., -routing_SR.shape[1] :].to(routing_SR.dtype)
        distance_SK = (routing_SR[:, None] - neighbours_SKR).square().sum(-1)
        weights_SK = batch.sidecar["neighbour_weights_SK"].to(routing_SR.dtype)
        loss = (weights_SK * distance_SK).sum()
        if "neighbour_spread_SR" in batch.sidecar:
            loss = loss + batch.sidecar["neighbour_spread_SR"][:, -routing_SR.shape[1] :].to(routing_SR.dtype).sum()
        return loss, _covered(batch).sum().to(routing_SR.dtype)


def sample_routing(records: Sequence[RoutingRecord], token_S: Tensor, num_tokens: int) -> Tensor:
    """Return the routing values of each sample [S, R]: the softmax over each layer's router columns.

    token_S: the token of each sample, as an index into the T tokens. The softmax is computed from the raw logits,
    before top-k, even if the router has another gate function. In a composite router, the columns of a part that does
    not see the token are 0.
    """
    parts = [part for record in records for part in record.routings]
    return torch.cat([_part_routing(part, token_S, num_tokens) for part in parts], dim=1)


def _part_routing(part: Routing, token_S: Tensor, num_tokens: int) -> Tensor:
    row_V = torch.arange(len(part.token_V), device=token_S.device)
    row_T = row_V.new_full((num_tokens,), len(part.token_V)).index_copy(0, part.token_V, row_V)
    row_S = row_T.index_select(0, token_S)
    logits_VC = F.pad(part.logits_VC, (0, 0, 0, 1))  # an extra row for tokens that this router does not see
    probs_SC = logits_VC.index_select(0, row_S).softmax(dim=1)
    return probs_SC * (row_S < len(part.token_V))[:, None]


def _covered(batch: Batch) -> Tensor:
    return (batch.sidecar["neighbour_weights_SK"] > 0).any(dim=1)
