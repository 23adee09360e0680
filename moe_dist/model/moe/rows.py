"""Conversion between tokens and rows. A row is a copy of a token for one expert.

take_rows copies tokens into rows, and add_up_rows sums the rows of each token. The backward pass of each function is
the forward pass of the other.

Shape suffixes: T tokens, D model width, N rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take_rows(x_TD: Tensor, token_ids_N: Tensor) -> Tensor:
    """Return x_TD[token_ids_N].

    The gradient of a token is the sum of the gradients of its rows, computed as in add_up_rows.
    """
    rows_ND: Tensor = _TakeRows.apply(x_TD, token_ids_N)
    return rows_ND


def add_up_rows(y_ND: Tensor, token_ids_N: Tensor, num_tokens: int) -> Tensor:
    """Sum the rows of each token in float32 or wider, and round the sum once to the rows' dtype. Returns [T, D]."""
    total_TD: Tensor = _AddUpRows.apply(y_ND, token_ids_N, num_tokens)
    return total_TD


def _add_up(y_ND: Tensor, token_ids_N: Tensor, num_tokens: int) -> Tensor:
    wide = torch.promote_types(y_ND.dtype, torch.float32)
    total_TD = y_ND.new_zeros(num_tokens, *y_ND.shape[1:], dtype=wide)
    return total_TD.index_add_(0, token_ids_N, y_ND.to(wide)).to(y_ND.dtype)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_ids_N: Tensor) -> Tensor:
        ctx.save_for_backward(token_ids_N)
        ctx.num_tokens = len(x_TD)
        return x_TD.index_select(0, token_ids_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (token_ids_N,) = ctx.saved_tensors
        return _add_up(grad_ND, token_ids_N, ctx.num_tokens), None


class _AddUpRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, token_ids_N: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(token_ids_N)
        return _add_up(y_ND, token_ids_N, num_tokens)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (token_ids_N,) = ctx.saved_tensors
        return grad_TD.index_select(0, token_ids_N), None, None
