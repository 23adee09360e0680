"""Differentiable exchange of rows between ranks, and sums over ranks.

Shape suffixes: S rows sent, R rows received. Both may have further dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all_rows(
    x_S: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send the first send_splits[0] rows of x_S to rank 0 of the group, the next send_splits[1] to rank 1, and so on.

    Return the received rows, ordered by sender. The backward pass sends each row's gradient back to the rank that sent
    the row. Collective: ranks that send and receive nothing must call it, too.
    """
    return _AllToAllRows.apply(x_S, list(send_splits), list(recv_splits), group)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_S, send_splits, recv_splits, group):
        ctx.exchange = (recv_splits, send_splits, group)
        return _exchange(x_S, send_splits, recv_splits, group)

    @staticmethod
    def backward(ctx, grad_R):
        return _exchange(grad_R, *ctx.exchange), None, None, None


def _exchange(x_S, send_splits, recv_splits, group):
    received_R = x_S.new_empty(sum(recv_splits), *x_S.shape[1:])
    dist.all_to_all_single(received_R, x_S.contiguous(), recv_splits, send_splits, group=group)
    return received_R


def sum_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sum tensors over the ranks of a group. If `group` is None, only this rank's tensors are used.

    Returns the sums on the host, in the tensors' dtypes. The sums are computed in float64, which is exact for integers
    up to 2^53.
    Collective: all tensors share one all-reduce and one device-to-host copy.
    """
    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    if group is not None:
        dist.all_reduce(flat, group=group)
    pieces = flat.cpu().split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, tensors, strict=True)]
