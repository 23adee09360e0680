"""LoRA: low-rank deltas of frozen weights, and experts that consist of such deltas (LLaVA-MoLE, arXiv 2401.16160).

Shape suffixes: R rows (sorted by expert if there are experts), D input width, r rank, F output width, e local experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model_section import DenseFFN, LoRAConfig, LoRAExpertsConfig
from moe_dist.core.costs import Product, linear_product
from moe_dist.core.expert_rows import set_expert_ids
from moe_dist.core.initial_values import constant_
from moe_dist.core.seeding import dropout
from moe_dist.model.moe.experts import HeldExperts, matmul_by_expert
from moe_dist.model.moe.swiglu import SwiGLU
from moe_dist.model.site import Site


class LowRank(nn.Module):
    """The LoRA delta (alpha / r) dropout(x) A B for one weight, or a stack of such deltas, one per expert.

    Source: Hu et al., arXiv 2106.09685, eq. 3. The matrix A, [D, r], is drawn from a normal distribution with the
    variance of Kaiming initialisation (a = sqrt(5)). The matrix B, [r, F], starts at zero, so the delta starts at zero,
    too. Dropout is a function of (seed, name, token, column), so it is the same in every layout and after a resume.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        lora: LoRAConfig,
        site: Site,
        expert_ids: Sequence[int] | None = None,
    ):
        """Create a single delta, or a stack of deltas if expert_ids is given.

        expert_ids: the global id of the expert to which each delta of the stack belongs. In a stack, A is [e, D, r] and
        B is [e, r, F].
        """
        super().__init__()
        self.scale, self.rate, rank = lora.alpha / lora.rank, lora.dropout, lora.rank
        self.key = site.key("dropout")
        self.num_weights = rank * (input_size + output_size)  # per expert
        stack = () if expert_ids is None else (len(expert_ids),)
        self.a = nn.Parameter(torch.empty(*stack, input_size, rank))
        self.b = nn.Parameter(torch.empty(*stack, rank, output_size))
        if expert_ids is not None:
            set_expert_ids(self.a, expert_ids)
            set_expert_ids(self.b, expert_ids)
        site.draw(self.a, "a", std=1 / math.sqrt(3 * input_size))
        constant_(self.b, 0.0)

    def drop(self, x_RD: Tensor, token_id_R: Tensor | None) -> Tensor:
        """Apply dropout to the input. The random numbers are seeded by the global token ids of the rows.

        If token_id_R is None, return the input unchanged.
        """
        return x_RD if token_id_R is None else dropout(x_RD, token_id_R, key=self.key, rate=self.rate)

    def forward(
        self,
        x_RD: Tensor,
        matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
        weights_R1: Tensor | float = 1.0,
    ) -> Tensor:
        """Return the delta [R, F]. x_RD: a result of `drop`.

        matmul: the function that multiplies rows by A and by B. weights_R1: factors that scale the rows of the delta.
        """
        return matmul(matmul(x_RD, self.a) * (self.scale * weights_R1), self.b)


class LoRAExperts(nn.Module):
    """Experts that share one dense SwiGLU feed-forward, the frozen base. Expert k adds its LoRA deltas E_k to the base.

    h = silu(W_g u + w E^g_k(u)) * (W_u u + w E^u_k(u));  y = W_d h + w E^d_k(h)

    Every rank holds the base. The combine weight w scales only the deltas. With `weighting: straight_through`, the
    value of w is 1, as in LLaVA-MoLE's released code. Every row includes the base's output, and the rows of a token are
    added up. A token must therefore have exactly one expert.
    """

    experts_per_token = 1

    def __init__(self, settings: LoRAExpertsConfig, held: HeldExperts):
        super().__init__()
        self.held, self.expert_ids, self.dropout = held, held.expert_ids, settings.dropout
        dense = DenseFFN(type="dense", hidden_size=held.size)
        self.base = SwiGLU(dense, held.site.child("base")).requires_grad_(False)
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
        """Return y_RD in the dtype of the rows. The combine weights (float32) are rounded to that dtype first.

        token_id_R: global token ids of the rows, which dropout needs.
        """
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
        """Return the matrix products of the experts and the router (`gates`), in the order that metrics/flops.py needs.

        The router gets its gradient through the combine weights, which scale only the LoRA deltas. This gradient does
        not flow back through the base's gate_up, so gate_up comes before the router's products.
        """
        return [
            linear_product(self.base.gate_up, rows, beside_lora=True),
            *gates,
            Product(self._num_weights() * rows, tuple(self.lora.parameters())),
            linear_product(self.base.down, rows, beside_lora=True),
        ]

    def num_parameters(self, experts: float) -> float:
        return self.base.num_parameters() + self._num_weights() * experts

    def _num_weights(self) -> int:
        """Return the number of weights in the LoRA deltas of one expert."""
        return sum(cast(LowRank, delta).num_weights for delta in self.lora.values())
