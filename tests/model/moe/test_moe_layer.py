"""The expert layer on one process and on gloo ranks, forward and backward, against the dense oracle in float64."""

import importlib

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_dist.core.routing_plan import RoutingPlan
from moe_dist.model.moe.dispatch import AllToAllDispatcher, LocalDispatcher, split_sizes
from moe_dist.model.moe.placement import make_placement
from moe_dist.parallel.layout import Layout, make_layout
from tests.support.distributed import run_ranks
from tests.support.moe_cases import BATCHES, ROUTERS, assert_equals_oracle, make_batch, make_layer, run_layer

CPU = torch.device("cpu")


class CountingReader:
    """A split_sizes that counts the layer's device reads."""

    def __init__(self):
        self.calls = 0

    def __call__(self, counts):
        self.calls += 1
        return split_sizes(counts)


def run_on_rank(rank, router, kind, expert, slices=1):
    layer = make_layer(router, kind, make_layout(expert=expert, device=CPU), slices)
    layer.dispatcher.split_sizes = reader = CountingReader()
    result = run_layer(layer, kind, rank)
    assert reader.calls == 1
    return result


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("router", ROUTERS)
def test_one_process(router, kind):
    layer = make_layer(router, kind)
    assert isinstance(layer.dispatcher, LocalDispatcher)
    assert_equals_oracle([run_layer(layer, kind, 0)], router, kind)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("router", ROUTERS)
def test_two_ranks(router, kind):
    assert_equals_oracle(run_ranks(run_on_rank, 2, router, kind, 2), router, kind)


@pytest.mark.parametrize("expert", [2, 4])
@pytest.mark.parametrize(
    "router, kind", [("top_2_sigmoid", "mixed"), ("moe_8x", "mixed"), ("4t4i", "one_sided"), ("7t1i", "rank_0_padding")]
)
def test_four_ranks(router, kind, expert):
    assert_equals_oracle(run_ranks(run_on_rank, 4, router, kind, expert), router, kind)


def test_the_skewed_case_leaves_a_rank_without_rows():
    results = run_ranks(run_on_rank, 2, "top_1", "skewed", 2)
    assert results[0]["gate_up_grad"][0].abs().max() > 0
    assert torch.equal(results[1]["gate_up_grad"], torch.zeros_like(results[1]["gate_up_grad"]))


def run_recomputed(rank):
    layer = make_layer("4t4i", layout=make_layout(expert=2, device=CPU))
    forward = layer.forward
    layer.forward = lambda x_TD, info: checkpoint(forward, x_TD, info, use_reentrant=False)
    return run_layer(layer, "mixed", rank)


def test_recomputed_activations_give_the_same_gradients():
    assert_equals_oracle(run_ranks(run_recomputed, 2), "4t4i", "mixed")


# Planted faults: each breaks one thing, and the comparison above must see it.


def _drop_a_row(layer):
    dispatch = layer.dispatcher.dispatch

    def faulty(x_TD, plan, token_id_T):
        rows_RD, receipt = dispatch(x_TD, plan, token_id_T)
        if len(rows_RD):
            rows_RD = torch.cat([rows_RD[:-1], torch.zeros_like(rows_RD[-1:])])
        return rows_RD, receipt

    layer.dispatcher.dispatch = faulty


def _forget_the_weights_gradient(layer):
    experts = layer.experts.forward
    layer.experts.forward = lambda rows, counts, weights, ids: experts(rows, counts, weights.detach(), ids)


def _rows_in_rank_order(layer):
    """Leave the received rows sorted by rank instead of by expert."""
    dispatch = layer.dispatcher.dispatch

    def faulty(x_TD, plan, token_id_T):
        rows_RD, receipt = dispatch(x_TD, plan, token_id_T)
        received_er = [list(column) for column in zip(*receipt.received_re)]
        pieces = rows_RD.split([size for row in received_er for size in row])
        inner = len(received_er[0])
        order = [e * inner + r for r in range(inner) for e in range(len(received_er))]
        return torch.cat([pieces[i] for i in order]), receipt

    layer.dispatcher.dispatch = faulty


def _gradient_kept_at_home(layer):
    """An all-to-all whose backward forgets to send anything back."""
    dispatch = layer.dispatcher.dispatch
    layer.dispatcher.dispatch = lambda x_TD, plan, token_id_T: dispatch(x_TD.detach(), plan, token_id_T)


FAULTS = {
    f.__name__: f for f in (_drop_a_row, _forget_the_weights_gradient, _rows_in_rank_order, _gradient_kept_at_home)
}


def run_faulty(rank, router, kind, expert, fault):
    layer = make_layer(router, kind, make_layout(expert=expert, device=CPU))
    FAULTS[fault](layer)
    result = run_layer(layer, kind, rank)
    if result["x_grad"] is None:
        result["x_grad"] = torch.zeros_like(result["y"])
    return result


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault):
    with pytest.raises(AssertionError, match="off by"):
        assert_equals_oracle(run_ranks(run_faulty, 2, "4t4i", "mixed", 2, fault), "4t4i", "mixed")


def test_spread_experts_need_a_group():
    with pytest.raises(ValueError, match="experts spread over 2 ranks need an expert-parallel process group"):
        make_layer("4t4i", layout=Layout(world=2, expert=2))


def _without_devices(rank):
    """Use meta tensors and an all-to-all that moves nothing, so that any device read is an error."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend
    group = dist.new_group([0, 1], backend="fake")
    layout = Layout(rank=rank, world=2, expert=2, ep_group=group)
    with torch.device("meta"):
        layer = make_layer("4t4i", layout=layout).bfloat16()
    placement = make_placement(layer.router.expert_groups, 2)
    x_TD, info, _ = make_batch("mixed", 0)
    plan, _ = make_layer("4t4i").router(x_TD, info)
    sent = [[int(plan.counts_E[expert]) for expert in row] for row in placement.local_experts]
    calls = []

    def injected(counts):
        calls.append(counts.shape)
        return [sent, [[5, 0, 3, 1], [0, 0, 2, 2]]]

    layer.dispatcher = AllToAllDispatcher(placement, group, split_sizes=injected)
    x_TD = torch.empty_like(x_TD, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y_TD, _ = layer(x_TD, info.to("meta"))
    y_TD.sum().backward()
    assert all(p.grad.shape == p.shape for p in layer.parameters())
    layer.dispatcher.split_sizes = split_sizes
    with pytest.raises(RuntimeError, match="meta"):
        layer(x_TD, info.to("meta"))
    return [tuple(shape) for shape in calls], tuple(x_TD.grad.shape)


def test_the_only_read_from_the_device_is_split_sizes():
    assert run_ranks(_without_devices, 2) == [([(2, 2, 4)], (24, 16))] * 2


def test_a_tokens_rows_are_added_up_in_float32():
    """bf16 cannot represent 257: summed in bf16, nine rows of one token would stay at the first one's 256.

    CPU's index_add happens to sum bf16 in float32 anyway; CUDA's does not.
    """
    plan = RoutingPlan(
        token_ids_N=torch.zeros(9, dtype=torch.int64), weights_N=torch.ones(9), counts_E=torch.tensor([9])
    )
    dispatcher = LocalDispatcher()
    _, receipt = dispatcher.dispatch(torch.zeros(2, 1, dtype=torch.bfloat16), plan)
    y_RD = torch.tensor([256.0] + [1.0] * 8, dtype=torch.bfloat16)[:, None]
    assert dispatcher.combine(y_RD, receipt).tolist() == [[264.0], [0.0]]


def _gradients(dtype):
    layer = make_layer("top_2_sigmoid").to(dtype)
    x_TD, info, loss_TD = make_batch("mixed", 0)
    x_TD = x_TD.detach().to(dtype).requires_grad_()
    y_TD, _ = layer(x_TD, info)
    (y_TD * loss_TD.to(dtype)).sum().backward()
    return [y_TD.detach(), x_TD.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision_stays_near_float64_and_repeats_bit_for_bit(dtype, tolerance):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        exact, first, second = _gradients(torch.float64), _gradients(dtype), _gradients(dtype)
    finally:
        torch.set_num_threads(threads)
    for expected, got, again in zip(exact, first, second):
        assert got.dtype == dtype and torch.equal(got, again)
        error = (got.double() - expected).norm() / expected.norm()
        assert error < tolerance
