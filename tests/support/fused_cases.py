"""Inputs for every fused function, and its deviation from float64 operations."""

import torch
from torch import Tensor

from moe_dist.core import seeding as random
from moe_dist.losses import language
from moe_dist.model import attention, mcore
from moe_dist.model.moe import experts, swiglu

ROWS = (48, 50, 1, 0)  # the first is compiled for its size, the second for any size; compilers treat 1 and 0 specially


def normal(*size, dtype):
    return torch.randn(*size, dtype=torch.float64).to(dtype)


def targets(rows):
    target_T = torch.arange(rows)
    return torch.where(target_T % 5 > 0, target_T % 50, -100)


CASES = {
    "gated": (swiglu.gated, lambda rows, dtype: (normal(rows, 32, dtype=dtype),)),
    "weighted": (experts.weighted, lambda rows, dtype: (normal(rows, 16, dtype=dtype), torch.rand(rows))),
    "head norm": (
        mcore._layer_norm,
        lambda rows, dtype: (normal(rows, 1, 4, 8, dtype=dtype), *(normal(8, dtype=dtype) for _ in range(2)), 1e-5),
    ),
    "dropout": (
        random._drop,
        lambda rows, dtype: (normal(rows, 18, dtype=dtype), torch.arange(rows), torch.tensor(-(2**62) + 5), 6554),
    ),
    "rotate": (
        attention.rotate,
        lambda rows, dtype: (normal(rows, 4, 8, dtype=dtype), *(normal(rows, 1, 8, dtype=dtype) for _ in range(2))),
    ),
    "cross-entropy": (
        language._cross_entropy,
        lambda rows, dtype: (normal(rows, 50, dtype=dtype) * 3, targets(rows)),
    ),
}


def deviations(function, oracle, arguments, device="cpu"):
    """Return |got - wanted| / |wanted| of the value and of each gradient: `function` on a device against `oracle` in
    float64.
    """
    exact = [a.detach().double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    moved = [a.detach().to(device) if isinstance(a, Tensor) else a for a in arguments]
    pairs = zip(run(function, moved), run(oracle, exact), strict=True)
    return [float((got.cpu().double() - wanted).norm() / wanted.norm().clamp(min=1e-30)) for got, wanted in pairs]


def run(function, arguments):
    """Return the value and the gradients of its weighted sum."""
    tensors = [a.requires_grad_(a.is_floating_point()) for a in arguments if isinstance(a, Tensor)]
    y = function(*arguments)
    weights = torch.linspace(0.5, 1.5, y.numel()).view_as(y).to(y.device, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], weights)]


def tolerance(name, dtype, device="cpu"):
    """Return the bound of `deviations`. On a CPU, torch's LayerNorm accumulates the gradient
    of its bias in bfloat16.
    """
    if dtype != torch.bfloat16:
        return 1e-5
    return 0.2 if name == "head norm" and torch.device(device).type == "cpu" else 1e-2
