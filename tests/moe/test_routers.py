"""Routers against their oracles; selection groups, ties, precision and settings."""

import pytest
import torch

from moe_dist.batch import IMAGE, TEXT
from moe_dist.errors import UserError
from moe_dist.moe.expert_choice import expert_capacity
from moe_dist.moe.registry import build_router, router_settings
from moe_dist.moe.router import Site
from tests import reference
from tests.moe.cases import BATCHES, ROUTERS, TOKENS, WIDTH, close, make_batch, make_info, make_layer

SITE = Site(hidden_size=WIDTH, layer=0, seed=7, init_std=0.3, name="router")


def dense(plan, num_tokens):
    """gates_TE that a plan stands for; a token twice at one expert would be counted twice."""
    gates_TE = torch.zeros(num_tokens, len(plan.counts_E), dtype=plan.weights_N.dtype)
    expert_N = torch.repeat_interleave(torch.arange(len(plan.counts_E)), plan.counts_E)
    return gates_TE.index_put((plan.token_ids_N, expert_N), plan.weights_N, accumulate=True)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("router", ROUTERS)
def test_plan_and_record_equal_the_oracle(router, kind):
    router = make_layer(router, kind).router
    x_TD, info, _ = make_batch(kind, 0)
    plan, record = router(x_TD, info)
    weights = [weight.detach() for weight in router.parameters()]
    close(dense(plan, TOKENS).detach(), reference.gates(router, x_TD.detach(), weights, info), "gates")
    assert int(plan.counts_E.sum()) == len(plan.token_ids_N) == len(plan.weights_N)
    assert record.plan is plan and record.layer == 3
    for expert in range(router.num_experts):
        reachable_T = info.valid_T.clone()
        if len(router.expert_groups) == 2:
            reachable_T &= info.modality_T == (TEXT if expert in router.expert_groups[0] else IMAGE)
        logits_T, probs_T = record.logits_TE[:, expert], record.probs_TE[:, expert]
        assert torch.equal(logits_T.isfinite(), reachable_T)
        assert torch.equal(logits_T == -torch.inf, ~reachable_T)
        assert torch.equal(probs_T > 0, reachable_T)


def test_what_layouts_and_losses_ask_of_a_router():
    built = {name: build_router(raw, SITE) for name, raw in ROUTERS.items()}
    assert {name for name, router in built.items() if router.causal} == {"top_1", "top_2_sigmoid", "top_8"}
    assert built["7t1i"].expert_groups == ((0, 1, 2, 3, 4, 5, 6), (7,))
    assert built["moe_8x"].expert_groups == (tuple(range(8)),)
    assert all(router.num_experts == 8 for router in built.values())
    assert built["4t4i"].text.gate.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "tokens, factor, experts, capacity",
    [
        (12, 1.0, 4, 3),
        (13, 1.0, 4, 4),
        (1, 1.0, 8, 1),
        (0, 1.0, 8, 0),
        (5, 9.0, 2, 5),
        (10, 1.1, 11, 1),
        (8, 1.5, 4, 3),
    ],
)
def test_capacity_rounds_up_and_stays_within_the_group(tokens, factor, experts, capacity):
    assert expert_capacity(tokens, factor, experts) == capacity


def _assignments(plan, info):
    """Set of (expert, token id)."""
    expert_N = torch.repeat_interleave(torch.arange(len(plan.counts_E)), plan.counts_E)
    return set(zip(expert_N.tolist(), info.token_id_T[plan.token_ids_N].tolist()))


@pytest.mark.parametrize("router", ["moe_8x", "4t4i", "6t2i"])
def test_identical_tokens_are_chosen_alike_in_every_layout(router):
    """Four groups in one micro-batch, or one by one with another rounding of the inputs: the same choice."""
    router = build_router(ROUTERS[router], SITE)
    generator = torch.Generator().manual_seed(1)
    groups, size = 4, 20
    prototypes = torch.randn(3, WIDTH, generator=generator)
    kind_T = torch.randint(3, (groups * size,), generator=generator)
    x_TD = prototypes[kind_T]
    modality_T, valid_T = kind_T % 2, torch.ones(groups * size, dtype=torch.bool)
    info = make_info(modality_T, valid_T, num_groups=groups)
    together = _assignments(router(x_TD, info)[0], info)
    apart = set()
    for group in range(groups):
        piece = slice(group * size, (group + 1) * size)
        part = make_info(modality_T[piece], valid_T[piece], first_id=group * size, num_groups=1)
        noise = 1e-7 * torch.randn(size, WIDTH, generator=generator)
        apart |= _assignments(router(x_TD[piece] + noise, part)[0], part)
    assert together == apart


def test_ties_are_broken_differently_by_expert_layer_and_seed():
    info = make_info(torch.zeros(64, dtype=torch.int64), torch.ones(64, dtype=torch.bool), num_groups=1)
    x_TD = torch.ones(64, WIDTH)
    choices = []
    for site in (SITE, Site(hidden_size=WIDTH, layer=1, seed=7, init_std=0.3, name="other"), SITE.child("x")):
        plan, _ = build_router(ROUTERS["moe_8x"], site)(x_TD, info)
        choices.append([frozenset(tokens.tolist()) for tokens in plan.token_ids_N.split(plan.counts_E.tolist())])
    assert len({choice for layer in choices for choice in layer}) == 3 * 8
    assert len(frozenset.union(*choices[0])) > 32  # not the same eighth for every expert


def test_selection_does_not_depend_on_padding_beside_it():
    router = build_router(ROUTERS["4t4i"], SITE)
    x_TD, info, _ = make_batch("mixed", 0)
    x_TD = x_TD.detach().float()
    changed = torch.where(info.valid_T[:, None], x_TD, torch.full_like(x_TD, 1e4))
    for first, second in zip(*(vars_of(router(x, info)[0]) for x in (x_TD, changed))):
        assert torch.equal(first, second)


def vars_of(plan):
    return plan.token_ids_N, plan.weights_N, plan.counts_E


@pytest.mark.parametrize("router", ROUTERS)
def test_routing_stays_float32_under_bf16_and_autocast(router):
    """bf16 parameters and inputs, with or without autocast: the plan is the float32 plan of the same values."""
    router = build_router(ROUTERS[router], SITE).bfloat16()
    x_TD, info, _ = make_batch("mixed", 0)
    x_TD = x_TD.detach().bfloat16()
    plan, record = router(x_TD, info)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = router(x_TD, info)
    exact, _ = router.float()(x_TD.float(), info)
    assert plan.weights_N.dtype == record.logits_TE.dtype == record.probs_TE.dtype == torch.float32
    for other in (under_autocast, exact):
        assert all(torch.equal(a, b) for a, b in zip(vars_of(plan), vars_of(other)))


def test_losses_reach_the_gate_through_the_record():
    router = build_router(ROUTERS["4t4i"], SITE).double()
    x_TD, info, _ = make_batch("mixed", 0)
    _, record = router(x_TD, info)
    record.probs_TE.sum().backward()
    text_TD = x_TD.detach()[info.valid_T & (info.modality_T == TEXT)]
    weight_ED = router.text.gate.weight.detach().clone().requires_grad_()
    (text_TD @ weight_ED.T).sigmoid().sum().backward()
    close(router.text.gate.weight.grad, weight_ED.grad, "gradient of the text gate")


def test_non_finite_inputs_do_not_break_the_plan():
    """The engine decides about a non-finite loss; the ranks must get as far as computing it."""
    router = build_router(ROUTERS["4t4i"], SITE)
    x_TD, info, _ = make_batch("mixed", 0)
    clean, _ = router(x_TD.float(), info)
    broken, _ = router(torch.full_like(x_TD, torch.nan).float(), info)
    assert torch.equal(clean.counts_E, broken.counts_E)


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"type": "top_kk"}, r"key 'model.ffn.router.type': there is no router 'top_kk' \(did you mean 'top_k'\?\)"),
        ({}, "there is no router 'None': one of top_k, expert_choice, modality"),
        ({"type": "top_k", "num_experts": 4, "topk": 2}, "unknown key 'model.ffn.router.topk'"),
        ({"type": "top_k", "num_experts": 4}, "key 'model.ffn.router.top_k' is missing"),
        ({"type": "top_k", "num_experts": 2, "top_k": 3}, "top_k=3 is more than num_experts=2"),
        ({"type": "expert_choice", "num_experts": 0}, "'model.ffn.router.num_experts'"),
        ({"type": "expert_choice", "num_experts": 4, "capacity_factor": 0}, "'model.ffn.router.capacity_factor'"),
        (
            {**ROUTERS["4t4i"], "image": {"type": "expert_choice", "num_expert": 4}},
            "unknown key 'model.ffn.router.image.num_expert' .did you mean 'num_experts'",
        ),
        ({"type": "modality", "text": {"type": "top_k"}}, "key 'model.ffn.router.image' is missing"),
    ],
)
def test_bad_settings_name_their_key(raw, message):
    with pytest.raises(UserError, match=message):
        router_settings(raw)
