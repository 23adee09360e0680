"""Functions that a GPU runs compiled are equal to the operations they are written in.

Traced, differentiated and decomposed as for a GPU, then run operation by operation; `make test-long` lets Inductor
write C++ of them. The GPU's own kernels are checked by benchmarks/gpu_check.py.
"""

import pytest
import torch
from torch import Tensor

import moe_dist.fused
from moe_dist.losses import language
from moe_dist.model import attention, mcore
from moe_dist.moe import experts, random, swiglu
from tests.long import LONG

ROWS = (48, 50, 1, 0)  # the first is compiled for its size, the second for any, then what compilers treat on their own


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


def run(function, arguments):
    tensors = [a.requires_grad_(a.is_floating_point()) for a in arguments if isinstance(a, Tensor)]
    y = function(*arguments)
    weights = torch.linspace(0.5, 1.5, y.numel()).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_float64(name, dtype):
    torch.manual_seed(0)
    function, make = CASES[name]
    compiled = torch.compile(function.__wrapped__, backend="inductor" if LONG else "aot_eager_decomp_partition")
    for rows in ROWS:
        arguments = make(rows, dtype)
        in_float64 = [a.detach().double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        for got, expected in zip(run(compiled, arguments), run(function, in_float64), strict=True):
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
            assert (got.double() - expected).norm() <= tolerance * expected.norm(), rows


def test_the_cpu_runs_the_operations_as_written(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or (lambda *_: pytest.fail()))
    doubled = moe_dist.fused.fused(lambda x: x * 2)
    assert compiled and torch.equal(doubled(torch.ones(3)), torch.full((3,), 2.0))
