"""Low-rank deltas beside frozen weights, and experts made of them (LLaVA-MoLE, arXiv 2401.16160).

Shape suffixes: R rows (of experts: sorted by expert), D input width, r rank, F output width, e local experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.core.expert_rows import set_expert_ids
from moe_dist.core.seeding import dropout, fold_key, seeded_normal_
from moe_dist.model.moe.experts import matmul_by_expert
from moe_dist.model.moe.swiglu import SwiGLU


class LowRank(nn.Module):
    """(alpha / r) dropout(x) A B (LoRA, Hu et al., arXiv 2106.09685, eq. 3), or a stack of them, one for each expert.

    A [D, r] is drawn as Kaiming's initialisation with a = sqrt(5) scales it, B [r, F] is zero: it starts as no change.
    Dropout follows from (seed, name, token, column), so it is the same at every layout and after a resume.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        seed: int,
        name: str,
        expert_ids: Sequence[int] | None = None,
    ):
        """`name`: global prefix of the parameters. With `expert_ids` they are stacked: [e, D, r] and [e, r, F]."""
        super().__init__()
        self.scale, self.rate = alpha / rank, dropout
        self.key = fold_key(seed, name, "dropout")
        stack = () if expert_ids is None else (len(expert_ids),)
        self.a = nn.Parameter(torch.empty(*stack, input_size, rank))
        self.b = nn.Parameter(torch.zeros(*stack, rank, output_size))
        if expert_ids is not None:
            set_expert_ids(self.a, expert_ids)
            set_expert_ids(self.b, expert_ids)
        seeded_normal_(self.a, seed=seed, name=f"{name}.a", std=1 / math.sqrt(3 * input_size))

    def drop(self, x_RD: Tensor, token_id_R: Tensor | None) -> Tensor:
        """The input with dropout, by the rows' global token ids; as it is without ids."""
        return x_RD if token_id_R is None else dropout(x_RD, token_id_R, key=self.key, rate=self.rate)

    def forward(
        self,
        x_RD: Tensor,
        matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
        weights_R1: Tensor | float = 1.0,
    ) -> Tensor:
        """The delta [R, F] of an input that has been through `drop`; a weight scales a row's delta."""
        return matmul(matmul(x_RD, self.a) * (self.scale * weights_R1), self.b)


class LoRAExperts(nn.Module):
    """Experts k that are deltas E_k of one dense SwiGLU feed-forward, the base, which every rank holds and none trains:

    h = silu(W_g u + w E^g_k(u)) * (W_u u + w E^u_k(u));  y = W_d h + w E^d_k(h)

    The combine weight w scales the deltas only. Where it is 1 in value (`weighting: straight_through`) this is the form
    of the released code, otherwise the weighted one. A row carries the base, so a token has exactly one expert.
    """

    experts_per_token = 1

    def __init__(
        self,
        expert_ids: Sequence[int],
        *,
        rank: int,
        alpha: float,
        dropout: float,
        hidden_size: int,
        expert_size: int,
        seed: int,
        name: str,
        init_std: float,
        output_std: float,
    ):
        """`name` is the global prefix of the parameters; `expert_size` the width of the base."""
        super().__init__()
        self.expert_ids, self.dropout = tuple(expert_ids), dropout
        self.base = SwiGLU(
            hidden_size, expert_size, seed=seed, name=f"{name}.base", init_std=init_std, output_std=output_std
        ).requires_grad_(False)

        self.lora = nn.ModuleDict()
        up, down = (hidden_size, expert_size), (expert_size, hidden_size)
        for key, sizes in {"gate": up, "up": up, "down": down}.items():
            self.lora[key] = LowRank(
                *sizes,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                seed=seed,
                name=f"{name}.lora.{key}",
                expert_ids=expert_ids,
            )

    @property
    def needs_token_ids(self) -> bool:
        return self.training and self.dropout > 0

    def forward(
        self, rows_RD: Tensor, counts_e: tuple[int, ...], weights_R: Tensor, token_id_R: Tensor | None = None
    ) -> Tensor:
        """y_RD in the dtype of the rows, to which the (float32) weights are rounded; dropout with token ids only."""
        matmul = partial(matmul_by_expert, counts_e=counts_e)
        weights_R1 = weights_R.to(rows_RD.dtype)[:, None]

        def delta(key: str, x: Tensor) -> Tensor:
            lora = cast(LowRank, self.lora[key])
            change: Tensor = lora(lora.drop(x, token_id_R), matmul, weights_R1)
            return change

        gate_RF, up_RF = self.base.gate_up(rows_RD).chunk(2, dim=1)
        h_RF = F.silu(gate_RF + delta("gate", rows_RD)) * (up_RF + delta("up", rows_RD))
        y_RD: Tensor = self.base.down(h_RF) + delta("down", h_RF)
        return y_RD
