"""Pretrained experts with LoRA deltas, and experts that share one feed-forward and differ only in their LoRA deltas
(LLaVA-MoLE, arXiv 2401.16160).

Shape suffixes: R rows (sorted by expert), D model width, F expert width, e local experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model_section import DenseFFN, LoRAConfig, LoRAExpertsConfig, SwiGLUExpertsConfig
from moe_dist.core.costs import Product, linear_product
from moe_dist.model.lora import LowRank, num_delta_weights, side_by_side
from moe_dist.model.moe.experts import GroupedExperts, HeldExperts, matmul_by_expert, weighted
from moe_dist.model.moe.swiglu import SwiGLU, gated

MATRICES = ("gate", "up", "down")  # the matrices of an expert


def stacked_deltas(settings: LoRAConfig, held: HeldExperts, parts: Iterable[str]) -> nn.ModuleDict:
    """Create stacked LoRA deltas, one per expert, for each part of the experts."""
    up, down = (held.site.hidden_size, held.size), (held.size, held.site.hidden_size)
    sizes = {"gate": up, "up": up, "down": down}
    site = held.site.child("lora")
    return nn.ModuleDict({p: LowRank(*sizes[p], settings, site.child(p), held.expert_ids) for p in parts})


class AdaptedExperts(GroupedExperts):
    """GroupedExperts with frozen weights, plus LoRA deltas of each expert for some of its matrices.

    h = silu(x W_gate + E_gate(x)) * (x W_up + E_up(x));  y = w (h W_down + E_down(h))
    """

    def __init__(self, settings: SwiGLUExpertsConfig, held: HeldExperts):
        super().__init__(settings, held)
        assert held.site.lora is not None
        self.requires_grad_(False)
        self.dropout = held.site.lora.dropout
        self.lora = stacked_deltas(held.site.lora, held, held.site.adapted("experts", MATRICES))

    @property
    def needs_token_ids(self) -> bool:  # type: ignore[override]
        return self.training and self.dropout > 0

    def forward(
        self, rows_RD: Tensor, counts_e: tuple[int, ...], weights_R: Tensor, token_id_R: Tensor | None = None
    ) -> Tensor:
        """Return the output y_RD in the dtype of the rows.

        The combine weights (float32) are rounded to that dtype first.
        token_id_R: global token ids of the rows, which dropout needs.
        """
        matmul = partial(matmul_by_expert, counts_e=counts_e)

        def product(x: Tensor, weight: Tensor, parts: dict[str, int]) -> Tensor:
            loras = {part: cast(LowRank, self.lora[part]) for part in parts if part in self.lora}
            deltas = {part: lora(lora.drop(x, token_id_R), matmul) for part, lora in loras.items()}
            y = matmul(x, weight)
            return y + side_by_side(x, parts, deltas) if deltas else y

        h_RF = gated(product(rows_RD, self.gate_up, {"gate": self.held.size, "up": self.held.size}))
        return weighted(product(h_RF, self.down, {"down": self.held.site.hidden_size}), weights_R)

    def products(self, rows: int, gates: list[Product]) -> list[Product]:
        gate_up, down = (product._replace(beside_lora=True) for product in super().products(rows, []))
        deltas = Product(num_delta_weights(self.lora) * rows, tuple(self.lora.parameters()))
        return [gate_up, deltas, down, *gates]

    def num_parameters(self, experts: float) -> float:
        return super().num_parameters(experts) + num_delta_weights(self.lora) * experts


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
        self.base = SwiGLU(dense, replace(held.site.child("base"), lora=None)).requires_grad_(False)
        self.lora = stacked_deltas(settings, held, MATRICES)

    @property
    def needs_token_ids(self) -> bool:
        return self.training and self.dropout > 0

    def forward(
        self, rows_RD: Tensor, counts_e: tuple[int, ...], weights_R: Tensor, token_id_R: Tensor | None = None
    ) -> Tensor:
        """Return the output y_RD in the dtype of the rows.

        The combine weights (float32) are rounded to that dtype first.
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
            Product(num_delta_weights(self.lora) * rows, tuple(self.lora.parameters())),
            linear_product(self.base.down, rows, beside_lora=True),
        ]

    def num_parameters(self, experts: float) -> float:
        return self.base.num_parameters() + num_delta_weights(self.lora) * experts
