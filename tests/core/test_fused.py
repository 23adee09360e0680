"""Functions that a GPU runs compiled are equal to the operations they are written in.

Traced, differentiated and decomposed as for a GPU, then run operation by operation; `make test-long` lets Inductor
write C++ of them. The GPU's own kernels are checked by benchmarks/gpu_check.py.
"""

import pytest
import torch
from torch import Tensor

import moe_dist.core.fused
from tests.support.fused_cases import CASES, ROWS, deviations, tolerance
from tests.support.long import LONG


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_float64(name, dtype):
    torch.manual_seed(0)
    function, make = CASES[name]
    compiled = torch.compile(function.__wrapped__, backend="inductor" if LONG else "aot_eager_decomp_partition")
    for rows in ROWS:
        assert max(deviations(compiled, function, make(rows, dtype))) <= tolerance(name, dtype), rows


def test_the_cpu_compiles_nothing(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: pytest.fail("compiled"))
    doubled = moe_dist.core.fused.fused(lambda x: x * 2)
    assert torch.equal(doubled(torch.ones(3)), torch.full((3,), 2.0))


class OnAGPU(Tensor):
    """A tensor that says so."""

    is_cuda = True


@pytest.mark.parametrize(
    ("rows", "change", "compiled"),
    [
        (3, None, True),
        (1, None, False),
        (0, None, False),
        (3, "disable", False),
        (3, "deterministic", False),
    ],
    ids=["rows", "one row", "no row", "turned off", "deterministic"],
)
def test_what_a_gpu_compiles(rows, change, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x * 3)
    doubled = moe_dist.core.fused.fused(lambda x: x * 2)
    torch.use_deterministic_algorithms(change == "deterministic")
    try:
        with torch._dynamo.config.patch(disable=change == "disable"):
            assert doubled(torch.ones(rows).as_subclass(OnAGPU)).tolist() == [3.0 if compiled else 2.0] * rows
    finally:
        torch.use_deterministic_algorithms(False)
