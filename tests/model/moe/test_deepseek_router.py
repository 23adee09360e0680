"""DeepSeek-V3's router: settings, the bias under casts, and the margins of its two selections."""

import pytest
import torch

from moe_dist.config.routers import router_settings
from moe_dist.core.errors import UserError
from moe_dist.model.moe.margins import watch_decisions
from moe_dist.model.moe.router import Site
from moe_dist.model.moe.router_registry import build_router
from tests.support.moe_cases import ROUTERS, WIDTH, make_info
from tests.support.routing_reference import bias_after

SITE = Site(hidden_size=WIDTH, layer=0, seed=7, init_std=0.3, name="router")
TINY = 1e-9


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"groups": 3}, "8 experts do not form 3 equal groups"),
        ({"groups": 8, "top_groups": 4}, "8 experts do not form 8 equal groups of two or more"),
        ({"top_groups": 5}, "top_groups=5 is more than groups=4"),
        ({"top_groups": 1}, "top_k=3 is more than the 2 experts of top_groups"),
        ({"bias_rate": -1.0}, r"model\.ffn\.router\.bias_rate"),
    ],
)
def test_settings_that_do_not_fit_are_named(change, sentence):
    with pytest.raises(UserError, match=sentence):
        build_router(router_settings(ROUTERS["deepseek"] | change), SITE)


@pytest.mark.parametrize(
    "load", [[4, 4, 4, 4, 4, 4, 4, 4], [0] * 8, [9, 1, 4, 4, 4, 4, 3, 3], [1, 0, 0, 0, 0, 0, 0, 1]]
)
def test_a_step_moves_the_bias_towards_balance(load):
    router = build_router(router_settings(ROUTERS["deepseek"] | {"bias_rate": 0.25}), SITE)
    router.after_step(torch.tensor(load))
    assert router.bias.value.tolist() == bias_after([0.0] * 8, load, 0.25)
    assert "bias.value" in router.state_dict() and "bias.value" not in dict(router.named_parameters())


def test_casts_leave_the_bias_in_float32():
    router = build_router(router_settings(ROUTERS["deepseek"]), SITE)
    router.bias.value.fill_(0.001)
    for cast in (router.bfloat16, router.double, lambda: router.to(torch.float16)):
        cast()
        assert router.bias.value.dtype == torch.float32 and torch.all(router.bias.value == torch.tensor(0.001))
    with torch.device("meta"):
        assert build_router(router_settings(ROUTERS["deepseek"]), SITE).bias.value.is_meta


def decisions(router, x_1D, token):
    """Return the choices and margins of all columns for one token, by router name."""
    zeros = torch.zeros(1, dtype=torch.int64)
    with watch_decisions(router) as found:
        router(x_1D, make_info(zeros, zeros == 0, first_id=token, num_groups=1))
    return {each.router: (each.chosen_VC[0], each.margin_VC[0]) for each in found}


def moved(router, expert, distance):
    router.bias.value.zero_()
    router.bias.value[expert] = distance


def test_margins_say_how_far_a_score_must_move():
    """In float64, a bias that raises a score changes the decision just beyond the margin, and not just below it."""
    router = build_router(router_settings(ROUTERS["deepseek"]), SITE).double()
    router.bias.value = router.bias.value.double()
    generator, tried = torch.Generator().manual_seed(0), {"": 0, ".groups": 0}
    for token in range(12):
        x_1D = torch.randn(1, WIDTH, generator=generator, dtype=torch.float64)
        moved(router, 0, 0.0)
        before = decisions(router, x_1D, token)
        scores_E = (router.gate.weight @ x_1D[0]).detach().sigmoid()
        for suffix, (chosen_C, margin_C) in before.items():
            for column in ((~chosen_C) & margin_C.isfinite()).nonzero().flatten().tolist():
                # The best expert of a group, or the expert itself.
                expert = 2 * column + int(scores_E[2 * column : 2 * column + 2].argmax()) if suffix else column
                for distance, flips in ((margin_C[column] - TINY, False), (margin_C[column] + TINY, True)):
                    moved(router, expert, distance)
                    assert bool(decisions(router, x_1D, token)[suffix][0][column]) == flips, (suffix, token, column)
                tried[suffix] += 1
    assert min(tried.values()) >= 12
