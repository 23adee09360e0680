"""LoRA on the query, key, value and output projections of attention.

Shape suffixes: T tokens, I input width, O output width, H heads, G query groups, d size per head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from moe_dist.config.model_section import LoRAConfig
from moe_dist.core.costs import Product, linear_product
from moe_dist.model.attention import Attending
from moe_dist.model.moe.lora_experts import LowRank
from moe_dist.model.site import Site


class LoRALinear(nn.Linear):
    """Linear layer x W^T with a frozen W, plus a LoRA delta for each part of the output.

    Source: Hu et al., arXiv 2106.09685, eq. 3.

    The output consists of `groups` groups. Each group contains an equal share of every part, in the order of `parts`.
    For example, the output of Megatron's fused projection is q q k v, q q k v, ...: its parts are q, k and v, and it
    has one group per key-value head.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parts: Mapping[str, int],
        groups: int,
        lora: LoRAConfig,
        site: Site,
        bias: bool = False,
    ):
        """Create the layer, with one LoRA delta per part.

        parts: a mapping from the name of each part to its output width. bias: whether the layer has a (frozen) bias.
        """
        super().__init__(input_size, output_size, bias=bias)
        self.requires_grad_(False)
        self.groups, self.dropout = groups, lora.dropout
        self.lora = nn.ModuleDict()
        for part, width in parts.items():
            self.lora[part] = LowRank(input_size, width, lora, site.child("lora").child(part))

    def with_dropout(self, x_TI: Tensor, token_id_T: Tensor) -> Tensor:
        """Return the input for `forward`: x_TI, followed by one copy of x_TI per part, each with its own dropout.

        The shape is [T, I * (1 + number of parts)]. If dropout is off (rate 0, or evaluation), the result is x_TI
        itself. Dropout is seeded by the token ids. Megatron cannot pass token ids to `forward`, so dropout is applied
        here.
        """
        if not (self.training and self.dropout):
            return x_TI
        return torch.cat([x_TI, *(lora.drop(x_TI, token_id_T) for lora in self._deltas())], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x, a result of `with_dropout`. Returns [..., O].

        The last dimension of x is I * (1 + number of parts) if dropout is on, otherwise I.
        """
        x, *dropped = x.split(self.in_features, dim=-1)
        inputs = dropped or [x] * len(self.lora)
        deltas = [lora(piece).unflatten(-1, (self.groups, -1)) for lora, piece in zip(self._deltas(), inputs)]
        return super().forward(x) + torch.cat(deltas, dim=-1).flatten(-2)

    def products(self, rows: int) -> list[Product]:
        deltas = sum(lora.num_weights for lora in self._deltas())
        return [linear_product(self, rows, beside_lora=True), Product(deltas * rows, tuple(self.lora.parameters()))]

    def _deltas(self) -> Iterable[LowRank]:
        return cast(Iterable[LowRank], self.lora.values())


@dataclass(frozen=True, slots=True)
class DroppedDocuments:
    """Attention for a layer whose output projection has LoRA.

    If dropout is on, `attend` returns the attention output followed by a copy of it with dropout. The copy is the input
    for the LoRA delta.
    """

    documents: Attending
    projection: LoRALinear
    token_id_T: Tensor

    def attend(self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor) -> Tensor:
        """Return [T, H, d], or [T, 2 H, d] if dropout is on: the H heads, then the same heads with dropout."""
        y_THd = self.documents.attend(query_THd, key_TGd, value_TGd)
        return self.projection.with_dropout(y_THd.flatten(1), self.token_id_T).unflatten(1, (-1, y_THd.shape[2]))
