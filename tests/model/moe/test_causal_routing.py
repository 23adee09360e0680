"""Routers in causal mode against loops over tokens and experts (MoMa, arXiv 2407.21770, eq. 3-4)."""

import math

import pytest
import torch

from moe_dist.config.model_section import DepthConfig
from moe_dist.config.routers import router_settings
from moe_dist.model.moe.depth_router import DepthRouter
from moe_dist.model.moe.router_registry import build_router
from moe_dist.model.site import Site
from tests.model.moe.test_routers import dense
from tests.support.moe_cases import BATCHES, TOKENS, WIDTH, close, make_batch

SITE = Site(hidden_size=WIDTH, layer=0, seed=7, init_std=0.6, name="router")
CHILD = {"type": "expert_choice", "num_experts": 4, "auxiliary": True}
MOMA = {"type": "modality", "text": CHILD, "image": {**CHILD, "num_experts": 3}}


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def dot(x, w):
    return sum(a * b for a, b in zip(x, w))


def naive(x, router):
    """Return one token's gate values where sigmoid(SiLU(x W1) W2) is above a half, and 0 elsewhere."""
    hidden = [z * sigmoid(z) for z in (dot(x, w) for w in router.auxiliary.w1.tolist())]
    assert len(hidden) == WIDTH // 2
    chosen = [sigmoid(dot(hidden, w)) > 0.5 for w in router.auxiliary.w2.tolist()]
    return [sigmoid(dot(x, w)) if hit else 0.0 for w, hit in zip(router.gate.weight.tolist(), chosen)]


@pytest.mark.parametrize("kind", BATCHES)
def test_experts_are_those_of_the_auxiliary_router_and_weights_those_of_the_main_one(kind):
    router = build_router(router_settings(MOMA), SITE).double()
    x_TD, info, _ = make_batch(kind, 0)
    plan, record = router(x_TD, info.causally())
    expected = torch.zeros(TOKENS, 7, dtype=torch.float64)
    for t in info.valid_T.nonzero().flatten().tolist():
        image = int(info.modality_T[t])
        values = naive(x_TD[t].tolist(), router.image if image else router.text)
        expected[t, 4 * image : 4 * image + len(values)] = torch.tensor(values, dtype=torch.float64)
    close(dense(plan, TOKENS).detach(), expected, "gates")
    assert torch.equal(record.load_E, (expected != 0).sum(0))
    if kind == "mixed":
        assert len((expected != 0).sum(1).unique()) > 2, "tokens hardly differ"


@pytest.mark.parametrize("scope", ["group", "modality", "sequence"])
@pytest.mark.parametrize("kind", BATCHES)
def test_depth_admits_what_its_auxiliary_router_says_and_keeps_its_own_gate_value(kind, scope):
    router = DepthRouter(DepthConfig(scope=scope, auxiliary=True), SITE).double()
    x_TD, info, _ = make_batch(kind, 0)
    admitted_T, routing = router(x_TD, info.causally())
    expected_T = torch.zeros(TOKENS, dtype=torch.bool)
    for t in info.valid_T.nonzero().flatten().tolist():
        expected_T[t] = naive(x_TD[t].tolist(), router)[0] > 0
    assert torch.equal(admitted_T, expected_T)
    own = [sigmoid(dot(x_TD[t].tolist(), router.gate.weight[0].tolist())) for t in routing.token_V.tolist()]
    torch.testing.assert_close(routing.probs_VC.flatten().tolist(), own, rtol=1e-9, atol=1e-12)
    assert kind != "mixed" or 0 < expected_T.sum() < info.valid_T.sum()


def test_gradients_of_an_auxiliary_router_are_those_of_its_formula():
    router = build_router(router_settings(CHILD), SITE).double()
    x_TD, info, _ = make_batch("mixed", 0)
    (part,) = router(x_TD, info)[1].routings
    scale_VC = torch.randn(part.auxiliary_VC.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (part.auxiliary_VC * scale_VC).sum().backward()
    w1, w2 = (weight.detach().clone().requires_grad_() for weight in (router.auxiliary.w1, router.auxiliary.w2))
    hidden = x_TD.detach()[part.token_V] @ w1.T
    ((hidden / (1 + torch.exp(-hidden))) @ w2.T * scale_VC).sum().backward()
    close(router.auxiliary.w1.grad, w1.grad, "gradient of W1")
    close(router.auxiliary.w2.grad, w2.grad, "gradient of W2")
    assert x_TD.grad is None and router.gate.weight.grad is None
