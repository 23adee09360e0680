"""Sliced experts against whole experts, forward and backward, in one process and on gloo ranks."""

import pytest
import torch

from moe_dist.model.moe import dispatch
from moe_dist.model.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from moe_dist.parallel.layout import make_layout
from tests.model.moe.test_moe_layer import run_on_rank
from tests.support.distributed import run_ranks
from tests.support.moe_cases import assert_equals_oracle, make_layer, run_layer

CASES = [  # and those whose plans hold assignments that go nowhere
    *[("7t1i", "mixed"), ("7t1i", "one_sided"), ("6t2i", "rank_0_padding"), ("moe_8x", "repeated")],
    *[("by_probability", "mixed"), ("padded", "mixed"), ("null_in_text", "one_token")],
]


@pytest.mark.parametrize("slices", [2, 4])
@pytest.mark.parametrize(("router", "kind"), CASES)
def test_one_process(router, kind, slices):
    layer = make_layer(router, kind, slices=slices)
    assert isinstance(layer.dispatcher, LocalDispatcher)
    assert layer.experts.down.shape == (8 * slices, 8, 16)
    assert_equals_oracle([run_layer(layer, kind, 0)], router, kind, slices)


@pytest.mark.parametrize("slices", [2, 4])  # so many as ranks, and more: then a rank has two slices of an expert
@pytest.mark.parametrize(("router", "kind"), CASES)
def test_two_ranks_read_the_device_once(router, kind, slices):
    assert_equals_oracle(run_ranks(run_on_rank, 2, router, kind, 2, slices), router, kind, slices)


@pytest.mark.parametrize(("router", "expert", "slices"), [("7t1i", 4, 4), ("6t2i", 4, 2), ("7t1i", 2, 2)])
def test_four_ranks(router, expert, slices):
    assert_equals_oracle(run_ranks(run_on_rank, 4, router, "mixed", expert, slices), router, "mixed", slices)


# --- planted faults


def _numbered_by_expert(x_N, placement, sent_re):
    """Send the rows for slice number i as if it belonged to expert i // slices, which is wrong."""
    counts = dict(zip(placement.order, (count for row in sent_re for count in row)))
    experts = len(counts) // placement.slices
    pieces = x_N.split([counts[expert] for expert in range(experts)])
    return torch.cat([pieces[number // placement.slices] for number in placement.order])


def _without_the_last_slice(layer):
    forward = layer.experts.forward

    def faulty(rows_RD, counts_e, weights_R, token_id_R):
        kept = sum(counts_e[: len(counts_e) // 2])
        y_RD = forward(rows_RD, counts_e, weights_R, token_id_R)
        return torch.cat([y_RD[:kept], torch.zeros_like(y_RD[kept:])])

    layer.experts.forward = faulty


def run_faulty(rank, fault):
    layer = make_layer("moe_8x", "mixed", make_layout(expert=2, device=torch.device("cpu")), 2)
    assert isinstance(layer.dispatcher, AllToAllDispatcher)
    with pytest.MonkeyPatch.context() as patch:
        if fault == "numbered by expert":
            patch.setattr(dispatch, "_by_rank", _numbered_by_expert)
        else:
            _without_the_last_slice(layer)
        return run_layer(layer, "mixed", rank)


@pytest.mark.parametrize("fault", ["numbered by expert", "without the last slice"])
def test_planted_faults_are_caught(fault):
    with pytest.raises(AssertionError, match="off by"):
        assert_equals_oracle(run_ranks(run_faulty, 2, fault), "moe_8x", "mixed", 2)
