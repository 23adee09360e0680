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

from moe_dist.config.recipe import LoRAConfig, LoRAExpertsConfig
from moe_dist.core.costs import Product, linear_product
from moe_dist.core.expert_rows import set_expert_ids
from moe_dist.core.seeding import dropout
from moe_dist.model.moe.experts import HeldExperts, matmul_by_expert
from moe_dist.model.moe.swiglu import SwiGLU
from moe_dist.model.site import Site


class LowRank(nn.Module):
    """(alpha / r) dropout(x) A B (LoRA, Hu et al., arXiv 2106.09685, eq. 3), or a stack of them, one for each expert.

    A [D, r] is drawn as Kaiming's initialisation with a = sqrt(5) scales it, B [r, F] is zero: it starts as no change.
    Dropout follows from (seed, name, token, column), so it is the same at every layout and after a resume.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        lora: LoRAConfig,
        site: Site,
        expert_ids: Sequence[int] | None = None,
    ):
        """With `expert_ids` the parameters are stacked: [e, D, r] and [e, r, F]."""
        super().__init__()
        self.scale, self.rate, rank = lora.alpha / lora.rank, lora.dropout, lora.rank
        self.key = site.key("dropout")
        self.num_weights = rank * (input_size + output_size)  # of one expert
        stack = () if expert_ids is None else (len(expert_ids),)
        self.a = nn.Parameter(torch.empty(*stack, input_size, rank))
        self.b = nn.Parameter(torch.zeros(*stack, rank, output_size))
        if expert_ids is not None:
            set_expert_ids(self.a, expert_ids)
            set_expert_ids(self.b, expert_ids)
        site.draw(self.a, "a", std=1 / math.sqrt(3 * input_size))

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

    def __init__(self, settings: LoRAExpertsConfig, held: HeldExperts):
        super().__init__()
        self.held, self.expert_ids, self.dropout = held, held.expert_ids, settings.dropout
        self.base = SwiGLU(held.size, held.site.child("base")).requires_grad_(False)
        self.lora = nn.ModuleDict()
        up, down = (held.site.hidden_size, held.size), (held.size, held.site.hidden_size)
        for key, sizes in {"gate": up, "up": up, "down": down}.items():
            self.lora[key] = LowRank(*sizes, settings, held.site.child("lora").child(key), held.expert_ids)

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

    def products(self, rows: int, gates: list[Product]) -> list[Product]:
        """Combine weights scale the deltas, so the base's first products do not need the gates' gradient."""
        return [
            linear_product(self.base.gate_up, rows, beside_lora=True),
            *gates,
            Product(self._num_weights() * rows, tuple(self.lora.parameters())),
            linear_product(self.base.down, rows, beside_lora=True),
        ]

    def num_parameters(self, experts: float) -> float:
        return self.base.num_parameters() + self._num_weights() * experts

    def _num_weights(self) -> int:
        """Return the number of weights of one expert's deltas."""
        return sum(cast(LowRank, delta).num_weights for delta in self.lora.values())
