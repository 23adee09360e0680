"""Grouped products against the readable loop and the dense oracle; empty groups, gradients, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_dist.config.model_section import SwiGLUExpertsConfig
from moe_dist.core.errors import UserError
from moe_dist.model.moe.experts import GroupedExperts, HeldExperts, grouped_matmul, looped_matmul, matmul_by_expert
from moe_dist.model.site import Site
from tests.support import routing_reference as reference
from tests.support.moe_cases import close

COUNTS = [(3, 0, 5, 1), (0, 0, 9, 0), (1, 1, 1, 1), (0, 0, 0, 0), (40, 0, 0, 7)]


def make_experts(expert_ids=(0, 1, 2, 3), size=24):
    site = Site(hidden_size=16, layer=0, seed=3, init_std=0.3, output_std=0.2, name="experts")
    return GroupedExperts(SwiGLUExpertsConfig(), HeldExperts(expert_ids=expert_ids, size=size, site=site))


def run(experts, rows_RD, counts, weights_R):
    rows_RD, weights_R = rows_RD.clone().requires_grad_(), weights_R.clone().requires_grad_()
    y_RD = experts(rows_RD, counts, weights_R)
    experts.zero_grad()
    (y_RD.double() * torch.linspace(-1, 1, 16, dtype=torch.float64)).sum().backward()
    return [y_RD.detach(), rows_RD.grad, weights_R.grad, experts.gate_up.grad, experts.down.grad]


def case(counts, dtype):
    generator = torch.Generator().manual_seed(sum(counts))
    rows = torch.randn(sum(counts), 16, generator=generator, dtype=torch.float64)
    weights = torch.rand(sum(counts), generator=generator, dtype=torch.float64)
    return rows.to(dtype), counts, weights.to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("counts", COUNTS)
def test_float64_equals_the_dense_oracle(counts):
    experts = make_experts().double()
    rows, counts, weights = case(counts, torch.float64)
    gates = torch.zeros(len(rows), 4, dtype=torch.float64)
    gates[torch.arange(len(rows)), torch.repeat_interleave(torch.arange(4), torch.tensor(counts))] = weights
    got = experts(rows, counts, weights).detach()
    assert got.shape == rows.shape
    if len(rows):
        close(got, reference.expert_layer(rows, gates, experts.gate_up, experts.down).detach(), "y")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_products_equal_float64(counts, dtype, tolerance):
    """The allocator is first filled with NaN, to find memory that a kernel does not write for an empty group."""
    exact = run(make_experts().double(), *case(counts, torch.float64))
    poison = [torch.full_like(value, torch.nan, dtype=dtype) for value in exact for _ in range(20)]
    del poison
    got = run(make_experts().to(dtype), *case(counts, dtype))
    for expected, value in zip(exact, got):
        assert value is not None and value.isfinite().all()
        assert (value.double() - expected).norm() <= tolerance * max(1.0, float(expected.norm()))
    for expert, count in enumerate(counts):
        if count == 0:
            assert not got[3][expert].any() and not got[4][expert].any()


def test_the_default_path_is_grouped(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "moe_dist.model.moe.experts.grouped_matmul", lambda *args: calls.append(args[0].dtype) or grouped_matmul(*args)
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        make_experts().to(dtype)(*case((3, 0, 5, 1), dtype))
    assert calls == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.parametrize(
    "capability, counts, grouped",
    [
        ((9, 0), (3, 0, 5, 1), True),
        ((9, 0), (0, 0, 0, 0), False),  # no row at all
        ((10, 0), (3, 1, 5, 1), True),
        ((10, 0), (3, 0, 5, 1), False),  # gradients of experts without rows are not written
        ((8, 0), (3, 1, 5, 1), False),  # no kernel: torch would read the device
        ((12, 0), (3, 1, 5, 1), False),
    ],
)
def test_a_card_without_a_sound_grouped_kernel_takes_the_loop(capability, counts, grouped, monkeypatch):
    taken = []
    for name in ("grouped_matmul", "looped_matmul"):
        monkeypatch.setattr(f"moe_dist.model.moe.experts.{name}", lambda *_, name=name: taken.append(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        x, weight = (torch.empty(*size, device="cuda", dtype=torch.bfloat16) for size in ((9, 16), (4, 16, 8)))
        matmul_by_expert(x, weight, counts)
        matmul_by_expert(x.float(), weight.float(), counts)
    assert taken == ["grouped_matmul" if grouped else "looped_matmul", "looped_matmul"]


@pytest.mark.parametrize("offset", [0, 4, 8])
def test_the_grouped_kernel_gets_aligned_memory(offset, monkeypatch):
    """CUDA's kernel needs 16-byte alignment; a view of a flat buffer may start anywhere."""
    weight = torch.randn(4 * 16 * 8 + offset, dtype=torch.bfloat16)[offset:].view(4, 16, 8).requires_grad_()
    x = torch.randn(9 * 16 + offset, dtype=torch.bfloat16)[offset:].view(9, 16)
    seen, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda a, b, offs: seen.extend([a, b]) or grouped_mm(a, b, offs=offs))
    y = grouped_matmul(x, weight, (3, 0, 5, 1))
    assert all(tensor.storage_offset() * tensor.element_size() % 16 == 0 for tensor in seen)
    assert (seen[0] is x) == (offset % 8 == 0)
    torch.testing.assert_close(y, looped_matmul(x, weight, (3, 0, 5, 1)), atol=2e-2, rtol=2e-2)


def test_loop_and_group_agree_on_every_group():
    x, weight = torch.randn(9, 16), torch.randn(4, 16, 8)
    torch.testing.assert_close(grouped_matmul(x, weight, (3, 0, 5, 1)), looped_matmul(x, weight, (3, 0, 5, 1)))


def test_an_experts_weights_depend_on_its_name_alone():
    everyone, some = make_experts(), make_experts((3, 1))
    for name in ("gate_up", "down"):
        parameter = getattr(some, name)
        assert parameter.expert_ids == (3, 1)
        assert torch.equal(parameter, getattr(everyone, name)[[3, 1]])
    assert everyone.down.std().item() == pytest.approx(0.2, rel=0.1)
    assert everyone.gate_up.std().item() == pytest.approx(0.3, rel=0.1)


def test_sizes_that_grouped_products_cannot_take_are_refused():
    with pytest.raises(UserError, match=r"model\.ffn\.hidden_size=20 is not a multiple of 8"):
        make_experts((0,), size=20)
