"""The experts of one rank. An Experts class computes the outputs of experts and also applies the combine weights.

Shape suffixes: R rows (sorted by expert), D model width, F expert width, e local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model_section import SwiGLUExpertsConfig
from moe_dist.core.costs import Product
from moe_dist.core.errors import UserError
from moe_dist.core.expert_rows import set_expert_ids
from moe_dist.core.fused import fused
from moe_dist.model.moe.swiglu import gated
from moe_dist.model.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldExperts:
    """The description of the experts that a rank holds. It is a constructor argument of the Experts classes."""

    expert_ids: tuple[int, ...]  # global ids; slice ids if experts are split into slices (Placement)
    size: int  # hidden size of each expert or slice; for LoRA experts, that of the shared dense base
    slices: int = 1  # slices per expert
    site: Site


class Experts(Protocol):
    """Interface for the experts of a rank.

    An implementation is an nn.Module that is constructed with (settings, HeldExperts). If an expert receives no rows,
    the gradient of its trainable parameters must be zero, not None. The same holds if no expert of the rank receives
    rows.
    rows_RD: the rows, sorted by local expert. counts_e: the number of rows of each local expert, as values on the host.
    weights_R: the combine weight of each row.
    """

    experts_per_token: int | None  # number of experts that a router must choose for every token; None: any
    needs_token_ids: bool  # the call needs token_id_R, the global token id of each row, to seed random numbers

    def __call__(
        self, rows_RD: Tensor, counts_e: tuple[int, ...], weights_R: Tensor, token_id_R: Tensor | None = None
    ) -> Tensor: ...

    def products(self, rows: int, gates: list[Product]) -> list[Product]:
        """Return the matrix products of the experts and of the router.

        rows: the number of assignments of tokens to experts. gates: the router's products. In the result, the products
        that depend on the combine weights come after the gates, and all others come before the gates. The order
        matters for the cost of the backward pass (metrics/flops.py).
        """
        ...

    def num_parameters(self, experts: float) -> float:
        """Count the parameters of a given number of experts, including the modules that all experts share.

        experts: the number of whole experts, not of slices.
        """
        ...


class GroupedExperts(nn.Module):
    """SwiGLU experts with combine weight w: y = w * (silu(x W_gate) * (x W_up)) W_down, without biases.

    All experts are computed together in two grouped matrix products. The parameters are stacked, one row per expert
    (core/expert_rows.py). If experts are split into slices (Placement), this class treats each slice as an expert. The
    hidden sizes of an expert's slices add up to the expert's hidden size F, and the outputs of the slices add up to the
    expert's output.
    """

    experts_per_token = None
    needs_token_ids = False

    def __init__(self, settings: SwiGLUExpertsConfig, held: HeldExperts):
        super().__init__()
        width, size, count = held.site.hidden_size, held.size, len(held.expert_ids)
        for key, value in (("model.hidden_size", width), ("model.ffn.hidden_size", size)):
            if value % 8:
                raise UserError(f"{key}={value} is not a multiple of 8, which grouped matrix products need")
        self.held, self.expert_ids = held, held.expert_ids
        self.gate_up = nn.Parameter(torch.empty(count, width, 2 * size))
        self.down = nn.Parameter(torch.empty(count, size, width))
        for key, parameter in (("gate_up", self.gate_up), ("down", self.down)):
            set_expert_ids(parameter, held.expert_ids)
            held.site.draw(parameter, key, onto_residual=key == "down")

    def forward(
        self, rows_RD: Tensor, counts_e: tuple[int, ...], weights_R: Tensor, token_id_R: Tensor | None = None
    ) -> Tensor:
        """Return y_RD in the dtype of the rows. The combine weights (float32) are rounded to that dtype first."""
        h_RF = gated(matmul_by_expert(rows_RD, self.gate_up, counts_e))
        return weighted(matmul_by_expert(h_RF, self.down, counts_e), weights_R)

    def products(self, rows: int, gates: list[Product]) -> list[Product]:
        matrix = self._matrix
        return [Product(2 * matrix * rows, (self.gate_up,)), Product(matrix * rows, (self.down,)), *gates]

    def num_parameters(self, experts: float) -> float:
        return 3 * self._matrix * experts

    @property
    def _matrix(self) -> int:
        """Return the number of weights in one of the three matrices of a whole expert."""
        return self.held.site.hidden_size * self.held.size * self.held.slices


@fused
def weighted(y_RD: Tensor, weights_R: Tensor) -> Tensor:
    """Multiply each row by its weight, after rounding the weight to the dtype of the rows."""
    return y_RD * weights_R.to(y_RD.dtype)[:, None]


def matmul_by_expert(x_RD: Tensor, weight_eDF: Tensor, counts_e: Sequence[int]) -> Tensor:
    """Multiply the rows of each expert by the matrix of that expert. Returns [R, F]."""
    multiply = grouped_matmul if _has_grouped_kernel(x_RD, counts_e) else looped_matmul
    return multiply(x_RD, weight_eDF, counts_e)


def grouped_matmul(x_RD: Tensor, weight_eDF: Tensor, counts_e: Sequence[int]) -> Tensor:
    """Compute matmul_by_expert with one kernel.

    The kernel needs D and F to be multiples of 8, so other sizes are padded.
    """
    inner, outer = -weight_eDF.shape[1] % 8, -weight_eDF.shape[2] % 8
    if inner:
        x_RD = F.pad(x_RD, (0, inner))
    if inner or outer:
        weight_eDF = F.pad(weight_eDF, (0, outer, 0, inner))
    ends_e = torch.tensor(counts_e, device="cpu").cumsum(0, dtype=torch.int32)
    y_RF = F.grouped_mm(_aligned(x_RD), _aligned(weight_eDF), offs=ends_e.to(x_RD.device, non_blocking=True))
    return y_RF[:, :-outer] if outer else y_RF


def looped_matmul(x_RD: Tensor, weight_eDF: Tensor, counts_e: Sequence[int]) -> Tensor:
    """Compute matmul_by_expert in a loop, as a readable reference and for dtypes without a grouped kernel (float64).

    The stack of weights is split once, with `unbind`. If each weight[i] were indexed separately, the gradient of each
    weight would be a tensor as large as the whole stack.
    """
    return torch.cat([x @ weight for x, weight in zip(x_RD.split(list(counts_e)), weight_eDF.unbind())])


def _has_grouped_kernel(x_RD: Tensor, counts_e: Sequence[int]) -> bool:
    """Return True if torch's grouped matmul is correct for these rows and does not wait for the GPU.

    On a CPU, the dtype must be float32 or bfloat16. On a GPU, the dtype must be bfloat16, and the compute capability
    must be 9.0 or 10.0. On 9.0, there must be at least one row. On 10.0, every expert must have at least one row,
    because the kernel can leave the weight gradients of the other experts unwritten (pytorch issue 172439).
    """
    if x_RD.dtype != torch.bfloat16:
        return x_RD.is_cpu and x_RD.dtype == torch.float32
    if not x_RD.is_cuda:
        return True
    capability = torch.cuda.get_device_capability(x_RD.device)
    return (capability == (9, 0) and any(counts_e)) or (capability == (10, 0) and all(counts_e))


def _aligned(x: Tensor) -> Tensor:
    """Return x, or a copy of x if its address is not a multiple of 16 bytes.

    Under ZeRO-3, x can be a view that begins at an unaligned address in a buffer.
    """
    return x.clone() if x.storage_offset() * x.element_size() % 16 else x
