"""Routing losses: load balance, LLaVA-MoLE's pooled balance, and the router z-loss. Padding is never counted.

Each loss is a mean over layers, so its weight does not depend on the model's depth. In a composite router, each part
(for example, the router of one modality) has its own loss, and the losses of the parts are added.

Shape suffixes: V routed tokens, E experts, C columns of a router (experts, then null experts), B sets of tokens over
which the load is balanced (groups, sequences or documents).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config.losses import LoadBalanceSettings, PooledBalanceSettings, RouterZSettings
from moe_dist.core.batch import Batch
from moe_dist.core.routing_plan import Routing
from moe_dist.core.step import ModelOutput
from moe_dist.losses.term import Context


class LoadBalance:
    """Load-balancing loss C * sum_c f_c P_c.

    Source: Fedus et al., arXiv 2101.03961, eq. 4; with null experts, AdaMoE, arXiv 2406.13233, eq. 6.

    For a set of tokens, f_c is the fraction of tokens that chose column c, and P_c is the mean gate value of column c.
    Each token chooses k columns, so the f_c sum to k. The gate values of each token are first normalized to sum to 1.
    Null experts are balanced as one pool: the f of each null expert is replaced by the mean f of all null experts. If
    the load is balanced, the loss is k. Choices are counted before full experts drop tokens.

    scope: the set of tokens over which the load is balanced. "group" is a selection group, and "sequence" is a packed
    sequence. The loss is the mean over these sets. "global" is the global batch. In this case, f is computed over all
    data-parallel ranks, but only over the micro-batches so far, because later ones are not known yet.
    """

    def __init__(self, settings: LoadBalanceSettings, context: Context):
        self.scope, self.context = settings.scope, context
        self.seen: list[Tensor] = []  # for scope "global": choices and tokens of the step's micro-batches so far

    names = ("loss/load_balance",)

    def counts(self, batch: Batch) -> tuple[int, ...]:
        if self.scope == "global":
            return (_valid_tokens(batch),)
        return (int(batch.info.valid_T.view(self._sets(batch), -1).any(dim=1).sum()),)

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, ...]:
        layers = [record.routings for record in output.records]
        parts = [part for layer in layers for part in layer]
        if self.scope == "global":
            losses = [_balance(probs_C, f_C) for probs_C, f_C in zip(_sums(parts), self._global_shares(parts, batch))]
        else:
            sets = self._sets(batch)
            losses = [self._of_sets(part, batch, sets) for part in parts]
        return (torch.stack(losses).sum() / len(layers),)

    def _sets(self, batch: Batch) -> int:
        return batch.info.num_groups * (self.context.group_sequences if self.scope == "sequence" else 1)

    def _of_sets(self, part: Routing, batch: Batch, sets: int) -> Tensor:
        """Return the loss of one router part, summed over all sets of tokens in a micro-batch.

        sets: the number of selection groups or of packed sequences, depending on the scope.
        """
        set_V = part.token_V // (batch.info.num_tokens // sets)
        tokens_B1 = _by_set(torch.ones_like(part.probs_VC[:, :1]), set_V, sets).clamp(min=1.0)
        f_BC = _by_set(part.chosen_VC.to(part.probs_VC.dtype), set_V, sets) / tokens_B1
        p_BC = _by_set(_normalized(part.probs_VC), set_V, sets) / tokens_B1
        return _balance(p_BC, _pool_nulls(f_BC, part.num_experts))

    def _global_shares(self, parts: list[Routing], batch: Batch) -> list[Tensor]:
        """Return the fractions f of each router part for scope "global". Collective.

        The fractions are computed over all data-parallel ranks and the micro-batches of the step so far. Each f is then
        multiplied by (number of all tokens / number of the part's tokens). The objective divides the loss by the number
        of all tokens. With this factor, the loss of a part becomes a mean over the part's own tokens.
        """
        columns = [part.chosen_VC.shape[1] for part in parts]
        choices = torch.cat([part.chosen_VC.sum(0) for part in parts])
        sizes = [len(part.token_V) for part in parts] + [_valid_tokens(batch)]
        # new_tensor would copy from the host and wait for the device; new_full does not.
        total = torch.cat([choices, *(choices.new_full((1,), size) for size in sizes)])
        if self.context.layout.dp_group is not None:
            dist.all_reduce(total, group=self.context.layout.dp_group)
        self.seen.append(total.to(parts[0].probs_VC.dtype))
        *choices_C, tokens, valid = torch.stack(self.seen).sum(0).split([*columns, len(parts), 1])
        shares = [choice_C * valid / count.clamp(min=1.0) ** 2 for choice_C, count in zip(choices_C, tokens)]
        return [_pool_nulls(f_C, part.num_experts) for f_C, part in zip(shares, parts)]


class PooledBalance:
    """The balance loss sum_c f_c P_c of each document, averaged over documents.

    This is the loss in LLaVA-MoLE's code (arXiv 2401.16160). For one document, the tokens of all layers are pooled: f_c
    is the fraction of (token, layer) pairs that chose column c, and P_c is the mean gate value of column c over all
    pairs. Each token chooses k of the C columns in every layer. Unlike LoadBalance, this loss has no factor C, so its
    value is k / C if the load is balanced.
    """

    def __init__(self, settings: PooledBalanceSettings, context: Context):
        pass

    names = ("loss/pooled_balance",)

    def counts(self, batch: Batch) -> tuple[int, ...]:
        return (batch.info.document_T[batch.info.valid_T].unique().numel(),)

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, ...]:
        documents = len(batch.info.document_lengths)
        layers = [record.routings for record in output.records]
        losses = []
        for parts in zip(*layers):  # the same router part in all layers
            document_V = torch.cat([batch.info.document_T.index_select(0, part.token_V) for part in parts])
            probs_VC = torch.cat([_normalized(part.probs_VC) for part in parts])
            chosen_VC = torch.cat([part.chosen_VC for part in parts]).to(probs_VC.dtype)
            tokens_B1 = _by_set(torch.ones_like(probs_VC[:, :1]), document_V, documents).clamp(min=1.0)
            f_BC = _by_set(chosen_VC, document_V, documents) / tokens_B1
            p_BC = _by_set(probs_VC, document_V, documents) / tokens_B1
            losses.append((f_BC * p_BC).sum())
        return (torch.stack(losses).sum(),)


class RouterZ:
    """The router z-loss, which keeps logits small: the mean over tokens of logsumexp(logits)^2.

    Source: Zoph et al., arXiv 2202.08906, eq. 5.
    """

    def __init__(self, settings: RouterZSettings, context: Context):
        pass

    names = ("loss/router_z",)

    def counts(self, batch: Batch) -> tuple[int, ...]:
        return (_valid_tokens(batch),)

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, ...]:
        parts = [part for record in output.records for part in record.routings]
        sums = [part.logits_VC.logsumexp(dim=1).square().sum() for part in parts]
        return (torch.stack(sums).sum() / len(output.records),)


def _balance(probs_C: Tensor, f_C: Tensor) -> Tensor:
    return probs_C.shape[-1] * (f_C * probs_C).sum()


def _sums(parts: list[Routing]) -> list[Tensor]:
    return [_normalized(part.probs_VC).sum(0) for part in parts]


def _normalized(probs_VC: Tensor) -> Tensor:
    return probs_VC / probs_VC.sum(dim=1, keepdim=True)


def _pool_nulls(f_C: Tensor, num_experts: int) -> Tensor:
    """Replace the f of every null expert with the mean f of all null experts."""
    true, null = f_C[..., :num_experts], f_C[..., num_experts:]
    return torch.cat([true, null.mean(dim=-1, keepdim=True).expand_as(null)], dim=-1)


def _by_set(values_VC: Tensor, set_V: Tensor, sets: int) -> Tensor:
    return values_VC.new_zeros(sets, values_VC.shape[1]).index_add(0, set_V, values_VC)


def _valid_tokens(batch: Batch) -> int:
    return sum(map(sum, batch.info.modality_counts))
