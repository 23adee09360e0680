"""LoRA: low-rank deltas of frozen weights, and linear layers that have them.

Shape suffixes: T tokens, I input width, O output width, H heads, G query groups, d size per head.
Shape suffixes of a delta: R rows (sorted by expert if there are experts), D input width, r rank, F output width, e
local experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from moe_dist.config.model_section import LoRAConfig
from moe_dist.core.costs import Product, linear_product, num_weights
from moe_dist.core.expert_rows import set_expert_ids
from moe_dist.core.initial_values import constant_
from moe_dist.core.seeding import dropout
from moe_dist.model.attention import Attending
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
        """Return the delta of each row, [R, F].

        x_RD: the input, after `drop`. matmul: the function that computes the products with the matrices A and B.
        weights_R1: the factor by which each row's delta is multiplied.
        """
        return matmul(matmul(x_RD, self.a) * (self.scale * weights_R1), self.b)


class LoRALinear(nn.Linear):
    """Linear layer x W^T (+ b) with frozen W and b, plus LoRA deltas for parts of the output.

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
        adapted: Iterable[str],
        site: Site,
        groups: int = 1,
        bias: bool = False,
    ):
        """Create the layer, with one LoRA delta for each part in `adapted`.

        parts: a mapping from the name of each part to its output width. bias: whether the layer has a (frozen) bias.
        """
        super().__init__(input_size, output_size, bias=bias)
        assert site.lora is not None
        self.requires_grad_(False)
        self.parts, self.groups, self.dropout = parts, groups, site.lora.dropout
        self.lora = nn.ModuleDict()
        for part in adapted:
            self.lora[part] = LowRank(input_size, parts[part], site.lora, site.child("lora").child(part))

    def with_dropout(self, x_TI: Tensor, token_id_T: Tensor) -> Tensor:
        """Return the input for `forward`: x_TI, followed by one copy of x_TI per delta, each with its own dropout.

        The shape is [T, I * (1 + number of deltas)]. If dropout is off (rate 0, or evaluation), the result is x_TI
        itself. Dropout is seeded by the token ids. Megatron cannot pass token ids to `forward`, so dropout is applied
        here.
        """
        if not (self.training and self.dropout):
            return x_TI
        return torch.cat([x_TI, *(lora.drop(x_TI, token_id_T) for lora in self._deltas())], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x, a result of `with_dropout`. Returns [..., O].

        The last dimension of x is I * (1 + number of deltas) if dropout is on, otherwise I.
        """
        x, *dropped = x.split(self.in_features, dim=-1)
        inputs = dropped or [x] * len(self.lora)
        deltas = {part: lora(piece) for part, lora, piece in zip(self.lora, self._deltas(), inputs)}
        return super().forward(x) + side_by_side(x, self.parts, deltas, self.groups)

    def products(self, rows: int) -> list[Product]:
        deltas = Product(num_delta_weights(self.lora) * rows, tuple(self.lora.parameters()))
        return [linear_product(self, rows, beside_lora=True), deltas]

    def _deltas(self) -> Iterable[LowRank]:
        return cast(Iterable[LowRank], self.lora.values())


def side_by_side(x: Tensor, parts: Mapping[str, int], deltas: Mapping[str, Tensor], groups: int = 1) -> Tensor:
    """Join the deltas of an output's parts into one tensor that is as wide as the output.

    A part without a delta is filled with zeros.
    parts: the width of each part. groups: see LoRALinear. x: the input, which gives the number of rows.
    """
    pieces = [deltas[part] if part in deltas else x.new_zeros(*x.shape[:-1], width) for part, width in parts.items()]
    return torch.cat([piece.unflatten(-1, (groups, -1)) for piece in pieces], dim=-1).flatten(-2)


def num_delta_weights(deltas: nn.ModuleDict) -> int:
    """Return the number of weights of LoRA deltas. If the deltas are stacked, count those of one expert only."""
    return sum(cast(LowRank, delta).num_weights for delta in deltas.values())


def make_linear(input_size: int, parts: Mapping[str, int], *, target: str, site: Site, bias: bool) -> nn.Linear:
    """Build a linear layer whose output consists of one or more parts of a LoRA target.

    If any of the parts gets LoRA deltas, the layer is a LoRALinear. Otherwise, it is a plain nn.Linear.
    parts: the output width of each part. site: the site of the layer.
    """
    size = sum(parts.values())
    if adapted := site.adapted(target, parts):
        return LoRALinear(input_size, size, parts=parts, adapted=adapted, site=site, bias=bias)
    return nn.Linear(input_size, size, bias=bias)


def apply_linear(linear: nn.Linear, x_TI: Tensor, token_id_T: Tensor) -> Tensor:
    """Apply a layer built by `make_linear`. token_id_T: global token ids, which seed the dropout of LoRA."""
    y_TO: Tensor = linear(linear.with_dropout(x_TI, token_id_T) if isinstance(linear, LoRALinear) else x_TI)
    return y_TO


def linear_products(linear: nn.Linear, rows: int) -> list[Product]:
    """Return the matrix products that a layer built by `make_linear` computes for this number of rows."""
    return linear.products(rows) if isinstance(linear, LoRALinear) else [linear_product(linear, rows)]


def num_linear_parameters(linear: nn.Linear) -> int:
    """Return the number of parameters of a layer built by `make_linear`."""
    deltas = num_delta_weights(linear.lora) if isinstance(linear, LoRALinear) else 0
    return num_weights(linear) + (0 if linear.bias is None else linear.out_features) + deltas


@dataclass(frozen=True, slots=True)
class DroppedDocuments:
    """Attention for a layer whose output projection has LoRA.

    If dropout is on, `attend` concatenates the attention output and a copy of it with dropout. The copy is the input
    for the LoRA delta.
    """

    documents: Attending
    projection: LoRALinear
    token_id_T: Tensor

    def attend(self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor) -> Tensor:
        """Return the attention output, [T, H, d].

        If dropout is on, return [T, 2 H, d]: the H heads, then a copy of them with dropout.
        """
        y_THd = self.documents.attend(query_THd, key_TGd, value_TGd)
        return self.projection.with_dropout(y_THd.flatten(1), self.token_id_T).unflatten(1, (-1, y_THd.shape[2]))
