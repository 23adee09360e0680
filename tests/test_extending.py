"""docs/extending.md is true: its router and its oracle, as printed there, forward and backward, over EP ranks too."""

import re

import pytest
import torch

from moe_dist.core.errors import UserError
from moe_dist.model.moe.router_registry import ROUTERS, router_settings
from moe_dist.parallel.layout import make_layout
from tests.support import ROOT
from tests.support import routing_reference as reference
from tests.support.distributed import run_ranks
from tests.support.moe_cases import ROUTERS as CASES
from tests.support.moe_cases import close, make_batch, make_layer, run_layer

PAGE = ROOT / "docs" / "extending.md"
SETTINGS = {"type": "threshold", "num_experts": 8, "threshold": 0.6}


def printed() -> tuple[str, dict]:
    """The router's source, and what the page defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {"torch": torch}
    for block in blocks:
        exec(block, names)
    return blocks[0], names


@pytest.fixture
def page(monkeypatch):
    source, names = printed()
    monkeypatch.setitem(ROUTERS, "threshold", names["ThresholdRouter"])
    return source, names


def run_with_the_new_router(rank, world):
    ROUTERS["threshold"] = printed()[1]["ThresholdRouter"]
    CASES["threshold"] = SETTINGS
    try:
        layout = make_layout(expert=world, device=torch.device("cpu"))
        return run_layer(make_layer("threshold", layout=layout), "mixed", rank)
    finally:
        del ROUTERS["threshold"], CASES["threshold"]


def test_it_is_short_and_strict(page):
    source, _ = page
    assert len(source.splitlines()) < 50
    with pytest.raises(UserError, match=r"'model\.ffn\.router\.threshold'"):
        router_settings(SETTINGS | {"threshold": 2.0})


@pytest.mark.parametrize("world", [1, 2])
def test_it_equals_its_oracle(page, monkeypatch, world):
    monkeypatch.setitem(CASES, "threshold", SETTINGS)
    oracle = page[1]["threshold_gates"]
    layer = make_layer("threshold")
    weights = [p.detach().clone().requires_grad_() for p in (layer.router.gate.weight, *layer.experts.parameters())]
    results = run_ranks(run_with_the_new_router, world, world)
    for rank, got in enumerate(results):
        x_TD, info, loss_TD = make_batch("mixed", rank)
        gates_TE = oracle(x_TD, weights[0], info, SETTINGS["threshold"])
        assert len(set((gates_TE > 0).sum(1).tolist())) > 3, "tokens should differ in how many experts they take"
        y_TD = reference.expert_layer(x_TD, gates_TE, *weights[1:])
        (y_TD * loss_TD).sum().backward()
        close(got["y"], y_TD.detach(), "y")
        close(got["x_grad"], x_TD.grad, "gradient of x")
    close(sum(got["gate_grads"][0] for got in results), weights[0].grad, "gradient of the gate")
