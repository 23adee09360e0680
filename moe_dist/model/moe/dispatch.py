"""Dispatch of tokens to the ranks of their experts, and combination of the results.

Shape suffixes: T tokens, D model width, E experts, e experts (or expert slices) on a rank, r ranks of the
expert-parallel group, N assignments of this rank's tokens, R rows received on this rank.

A dispatcher has no parameters. It follows a RoutingPlan. Rows are copies of tokens, sorted by expert. Each row is sent
together with a combine weight. Combine weights keep their dtype and their gradient, and the Experts class applies them.
If experts are split into slices (Placement), each slice gets all rows of its expert, and the expert's output is the sum
over its slices.

Both `combine` and the gradient of `dispatch` add up the rows of a token. They compute the sum in float32 or wider, and
round it once to the rows' dtype. The sum is bitwise repeatable on CPU, and on CUDA under
torch.use_deterministic_algorithms(True).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.core.routing_plan import RoutingPlan
from moe_dist.model.moe.placement import Placement
from moe_dist.model.moe.rows import add_up_rows, take_rows
from moe_dist.parallel.collectives import all_to_all_rows
from moe_dist.parallel.layout import Layout

SplitSizes = Callable[[Tensor], Any]


def split_sizes(counts: Tensor) -> list[Any]:
    """Copy counts to the host, as nested lists. This is the one device-to-host sync of an expert layer."""
    return counts.tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The information about a dispatch that the experts and `combine` need, in addition to the rows."""

    counts_e: tuple[int, ...]  # rows of each local expert; sums to R
    weights_R: Tensor
    token_id_R: Tensor | None  # int64 global token id of each row; None if `dispatch` got no ids
    token_ids_N: Tensor  # the token of each row, in the order in which rows return to this rank
    num_tokens: int
    sent_re: list[list[int]]  # rows sent to each expert of each rank
    received_re: list[list[int]]  # rows received from each rank for each local expert


class Dispatcher(Protocol):
    def dispatch(self, x_TD: Tensor, plan: RoutingPlan, token_id_T: Tensor | None = None) -> tuple[Tensor, Receipt]:
        """Send each token to the ranks of its experts. Returns the rows that this rank received, and a receipt.

        The receipt holds what the experts and `combine` need in addition to the rows.
        token_id_T: global token ids to send with the rows.
        """
        ...

    def combine(self, y_RD: Tensor, receipt: Receipt) -> Tensor: ...


class LocalDispatcher:
    """Dispatcher for a single rank, which holds all experts. slices: the number of slices per expert."""

    def __init__(self, slices: int = 1, split_sizes: SplitSizes = split_sizes):
        self.slices, self.split_sizes = slices, split_sizes

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan, token_id_T: Tensor | None = None) -> tuple[Tensor, Receipt]:
        counts_E = self.split_sizes(plan.counts_E)
        token_ids_N, weights_N = (x_N[: sum(counts_E)] for x_N in (plan.token_ids_N, plan.weights_N))
        if self.slices > 1:
            token_ids_N, weights_N = token_ids_N.repeat(self.slices), weights_N.repeat(self.slices)
        counts = counts_E * self.slices
        receipt = Receipt(
            counts_e=tuple(counts),
            weights_R=weights_N,
            token_id_R=None if token_id_T is None else token_id_T.index_select(0, token_ids_N),
            token_ids_N=token_ids_N,
            num_tokens=x_TD.shape[0],
            sent_re=[counts],
            received_re=[counts],
        )
        return take_rows(x_TD, token_ids_N), receipt

    def combine(self, y_RD: Tensor, receipt: Receipt) -> Tensor:
        return add_up_rows(y_RD, receipt.token_ids_N, receipt.num_tokens)


class AllToAllDispatcher:
    """Dispatcher for experts that `placement` distributes over the ranks of `group`.

    Collective: every rank of the group must call dispatch and combine, even with an empty x_TD.
    """

    def __init__(self, placement: Placement, group: dist.ProcessGroup, split_sizes: SplitSizes = split_sizes):
        self.placement, self.group, self.split_sizes = placement, group, split_sizes
        self.order_E = torch.tensor(placement.order, device="cpu")

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan, token_id_T: Tensor | None = None) -> tuple[Tensor, Receipt]:
        sent_re, received_re = self.split_sizes(self._exchange_counts(plan.counts_E))
        token_ids_N = _by_rank(plan.token_ids_N, self.placement, sent_re)
        weights_N = _by_rank(plan.weights_N, self.placement, sent_re)
        send, recv = _totals(sent_re), _totals(received_re)

        def deliver(x_N: Tensor) -> Tensor:
            return _swap_blocks(all_to_all_rows(x_N, send, recv, self.group), received_re)

        rows_RD = deliver(take_rows(x_TD, token_ids_N))
        receipt = Receipt(
            counts_e=tuple(sum(column) for column in zip(*received_re)),
            weights_R=deliver(weights_N),
            token_id_R=None if token_id_T is None else deliver(token_id_T.index_select(0, token_ids_N)),
            token_ids_N=token_ids_N,
            num_tokens=x_TD.shape[0],
            sent_re=sent_re,
            received_re=received_re,
        )
        return rows_RD, receipt

    def combine(self, y_RD: Tensor, receipt: Receipt) -> Tensor:
        received_er = [list(column) for column in zip(*receipt.received_re)]
        y_RD = _swap_blocks(y_RD, received_er)
        y_ND = all_to_all_rows(y_RD, _totals(receipt.received_re), _totals(receipt.sent_re), self.group)
        return add_up_rows(y_ND, receipt.token_ids_N, receipt.num_tokens)

    def _exchange_counts(self, counts_E: Tensor) -> Tensor:
        """Exchange row counts with the other ranks. Returns int64 [2, r, e]. Collective.

        Entry [0] is the number of rows to send to each expert of each rank. Entry [1] is the number of rows to receive
        from each rank for each local expert.
        """
        order_E = self.order_E.to(counts_E.device, non_blocking=True)
        sent_re = counts_E.repeat(self.placement.slices).index_select(0, order_E).view(self.placement.num_ranks, -1)
        received_re = torch.empty_like(sent_re)
        dist.all_to_all_single(received_re, sent_re, group=self.group)
        return torch.stack([sent_re, received_re])


def make_dispatcher(placement: Placement, layout: Layout) -> Dispatcher:
    if placement.num_ranks == 1:
        return LocalDispatcher(placement.slices)
    if layout.ep_group is None:
        raise ValueError(f"experts spread over {placement.num_ranks} ranks need an expert-parallel process group")
    return AllToAllDispatcher(placement, layout.ep_group)


def _by_rank(x_N: Tensor, placement: Placement, sent_re: list[list[int]]) -> Tensor:
    """Sort values that belong to assignments, first by receiving rank, then by local expert.

    If experts are split into slices, each value is repeated for every slice of the expert. Assignments without an
    expert are left out.
    x_N: one value per assignment, sorted by expert. sent_re: the number of rows to send to each expert of each rank.
    """
    counts = dict(zip(placement.order, (count for row in sent_re for count in row)))
    counts_E = [counts[expert] for expert in range(len(counts) // placement.slices)]
    pieces = x_N[: sum(counts_E)].split(counts_E)
    return torch.cat([pieces[number % len(counts_E)] for number in placement.order])


def _swap_blocks(x_R: Tensor, sizes: list[list[int]]) -> Tensor:
    """Reorder blocks of rows that are sorted by (a, b), so that they are sorted by (b, a).

    sizes[a][b] is the number of rows of block (a, b).
    """
    pieces = x_R.split([size for row in sizes for size in row])
    inner = len(sizes[0])
    return torch.cat([pieces[a * inner + b] for b in range(inner) for a in range(len(sizes))])


def _totals(sizes: list[list[int]]) -> list[int]:
    return [sum(row) for row in sizes]
