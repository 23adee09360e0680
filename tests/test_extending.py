"""docs/extending.md is true: its routers, loss term and Hugging Face family, as printed, against their oracles."""

import re
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

from moe_dist.config import losses, routers
from moe_dist.config.recipe import load_config
from moe_dist.convert.families.family_registry import FAMILIES
from moe_dist.convert.hugging_face import import_folder
from moe_dist.core.errors import UserError
from moe_dist.losses.term import Context
from moe_dist.model.moe.router_registry import ROUTERS
from moe_dist.parallel.layout import make_layout
from tests.losses.test_balance import Output
from tests.losses.test_balance import make_batch as make_loss_batch
from tests.support import ROOT
from tests.support import routing_reference as reference
from tests.support.distributed import run_ranks
from tests.support.hugging_face_models import load_checkpoint, logits_apart, logits_packed, random_documents
from tests.support.moe_cases import ROUTERS as CASES
from tests.support.moe_cases import TOKENS, WIDTH, close, make_batch, make_layer, run_layer
from tests.support.toy_model import make_config, objective
from tests.support.trajectory import step_inputs, toy_engine

PAGE = ROOT / "docs" / "extending.md"
RATE = 0.05
RECIPE = ROOT / "configs" / "moma_quickstart.yaml"
SETTINGS = {"type": "threshold", "num_experts": 8, "threshold": 0.6}


def printed(heading: str, known: dict | None = None) -> tuple[str, dict]:
    """The first block of code under a heading, and what all its blocks define, beside what is known.

    Settings are printed as they would stand in config/routers.py and config/losses.py.
    """
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict = {"torch": torch} | vars(losses) | vars(routers) | (known or {})
    for block in blocks:
        exec(block, names)
    return blocks[0], names


@pytest.mark.parametrize("heading", ["A router", "A loss term", "A Hugging Face family"])
def test_it_is_short(heading):
    assert len(printed(heading)[0].splitlines()) < 50


@contextmanager
def printed_router():
    names = printed("A router")[1]
    ROUTERS[names["ThresholdSettings"]] = names["ThresholdRouter"]
    CASES["threshold"] = SETTINGS
    try:
        yield names
    finally:
        del ROUTERS[routers.RouterSettings.kinds.pop("threshold")], CASES["threshold"]


@pytest.fixture
def router():
    with printed_router() as names:
        yield names


@pytest.fixture
def term():
    """What the page defines of a loss term."""
    yield printed("A loss term")[1]
    del losses.TermSettings.kinds["gate_entropy"]


def run_with_the_new_router(rank, world):
    with printed_router():
        layout = make_layout(expert=world, device=torch.device("cpu"))
        return run_layer(make_layer("threshold", layout=layout), "mixed", rank)


@contextmanager
def printed_router_with_state():
    names = printed("A router with state", printed("A router")[1])[1]
    ROUTERS[names["BalancedThresholdSettings"]] = names["BalancedThresholdRouter"]
    try:
        yield names
    finally:
        del ROUTERS[routers.RouterSettings.kinds.pop("balanced_threshold")], routers.RouterSettings.kinds["threshold"]


def steps_of_the_router_with_state(rank):
    """Shifts before each of three steps and after the last, and the load of each on this rank."""
    settings = {"type": "balanced_threshold", "num_experts": 8, "threshold": 0.5, "rate": RATE}
    with printed_router_with_state():
        config = make_config(router=settings, expert=2, groups=8, micro=2)
        engine, layout = toy_engine(config)
    router, shifts, loads = engine.module.ffn.router, [], []
    router.register_forward_hook(lambda _, inputs, output: loads.append(output[1].load_E))
    of_steps = []
    for step in range(3):
        shifts.append(router.shift.value.tolist())
        loads.clear()
        engine.train_step(step_inputs(step, layout, config), objective, 0.1)
        of_steps.append(torch.stack(loads).sum(0).tolist())
    return [*shifts, router.shift.value.tolist()], of_steps


def test_a_router_with_state_follows_the_load_of_all_ranks():
    with printed_router_with_state() as names:
        shifts_after = names["shifts_after"]
    (shifts, first), (others, second) = run_ranks(steps_of_the_router_with_state, 2)
    assert shifts == others
    for step in range(3):
        load_E = [a + b for a, b in zip(first[step], second[step], strict=True)]
        expected = shifts_after(shifts[step], load_E, RATE)
        assert shifts[step + 1] == pytest.approx(expected, abs=1e-7)
    assert all(before != after for before, after in pairwise(shifts))


def test_a_router_is_strict(router):
    with pytest.raises(UserError, match=r"'model\.ffn\.router\.threshold'"):
        load_config(RECIPE, [f"model.ffn.router={SETTINGS | {'threshold': 2.0}}"])


@pytest.mark.parametrize("world", [1, 2])
def test_a_router_equals_its_oracle(router, world):
    layer = make_layer("threshold")
    weights = [p.detach().clone().requires_grad_() for p in (layer.router.gate.weight, *layer.experts.parameters())]
    results = run_ranks(run_with_the_new_router, world, world)
    for rank, got in enumerate(results):
        x_TD, info, loss_TD = make_batch("mixed", rank)
        gates_TE = router["threshold_gates"](x_TD, weights[0], info, SETTINGS["threshold"])
        assert len(set((gates_TE > 0).sum(1).tolist())) > 3, "tokens should differ in how many experts they take"
        y_TD = reference.expert_layer(x_TD, gates_TE, *weights[1:])
        (y_TD * loss_TD).sum().backward()
        close(got["y"], y_TD.detach(), "y")
        close(got["x_grad"], x_TD.grad, "gradient of x")
    close(sum(got["gate_grads"][0] for got in results), weights[0].grad, "gradient of the gate")


def term_inputs(rank):
    """x_TD and a batch of which another rank has more tokens."""
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    return x_TD, make_loss_batch(torch.arange(TOKENS) % 3 >= rank)


def run_the_new_term(rank, world):
    """This rank's sum and count, and its part of the gate's gradient of the sum."""
    layout = make_layout(expert=1, device=torch.device("cpu"))
    names = printed("A loss term")[1]
    (settings,) = losses.loss_settings({"gate_entropy": {"weight": 0.01}}).values()
    term = names["GateEntropy"](settings, Context(layout=layout, group_sequences=1))
    layer, (x_TD, batch) = make_layer("top_2_sigmoid"), term_inputs(rank)
    (total,) = term(Output((layer(x_TD, batch.info)[1],)), batch)
    total.backward()
    return total.detach(), term.counts(batch)[0], layer.router.gate.weight.grad


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_term_equals_its_oracle(term, world):
    results = run_ranks(run_the_new_term, world, world)
    assert len({count for _, count, _ in results}) == world, "ranks should differ in their number of tokens"
    weight_ED = make_layer("top_2_sigmoid").router.gate.weight.detach().clone().requires_grad_()
    inputs = [term_inputs(rank) for rank in range(world)]
    counts = [int(batch.info.valid_T.sum()) for _, batch in inputs]
    oracle = term["gate_entropy"]
    values = [oracle(x_TD, weight_ED, batch.info) for x_TD, batch in inputs]
    expected = sum(value * count for value, count in zip(values, counts)) / sum(counts)
    expected.backward()
    divisor = sum(count for _, count, _ in results)
    close(sum(total for total, _, _ in results) / divisor, expected.detach(), "the loss")
    close(sum(gradient for _, _, gradient in results) / divisor, weight_ED.grad, "gradient of the gate")


def test_a_loss_term_is_strict(term):
    for settings in ({}, {"weight": -1.0}):
        with pytest.raises(UserError, match=r"'losses\.gate_entropy\.weight'"):
            load_config(RECIPE, [f"losses.gate_entropy={settings}"])


def test_a_family_gives_the_logits_of_transformers(monkeypatch, tmp_path):
    names = printed("A Hugging Face family")[1]
    monkeypatch.setitem(FAMILIES, "phi3", names["PHI3"])
    torch.manual_seed(0)
    theirs = names["random_phi3"]()
    theirs.save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "out")
    documents = random_documents()
    expected, ours = logits_apart(theirs, documents), logits_packed(load_checkpoint(tmp_path / "out"), documents)
    assert expected.abs().max() > 3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_a_family_is_exact_both_ways():
    names = printed("A Hugging Face family")[1]
    model, vocab_size = names["PHI3"].model_section(names["random_phi3"]().config.to_dict(), "config.json")
    fused = 0
    of_llama, of_phi3 = (family.tensor_mappings(model, vocab_size) for family in (FAMILIES["llama"], names["PHI3"]))
    for llama, mapping in zip(of_llama, of_phi3, strict=True):
        ours = torch.randn(mapping.shape)
        theirs = mapping.split(ours)
        assert [tensor.shape for tensor in theirs] == list(mapping.sources.values())
        assert torch.equal(mapping.join(*theirs), ours) and mapping.name == llama.name
        fused += len(llama.sources) > len(mapping.sources)
    assert fused == 2 * model.num_layers
