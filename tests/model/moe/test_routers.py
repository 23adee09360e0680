"""Routers against their oracles; selection groups, ties, precision and settings."""

import math

import pytest
import torch

from moe_dist.config.routers import RouterSettings, router_settings
from moe_dist.core.batch import TEXT
from moe_dist.core.errors import UserError
from moe_dist.model.moe.capacity import expert_capacity
from moe_dist.model.moe.router import Site, selection_keys, selection_margins
from moe_dist.model.moe.router_registry import ROUTERS as REGISTRY
from moe_dist.model.moe.router_registry import build_router
from tests.support import routing_reference as reference
from tests.support.moe_cases import BATCHES, ROUTERS, TOKENS, WIDTH, close, make_batch, make_info, make_layer

SITE = Site(hidden_size=WIDTH, layer=0, seed=7, init_std=0.3, name="router")


def dense(plan, num_tokens):
    """Return the gates_TE that a plan describes. A token that has one expert twice would be counted twice."""
    gates_TE = torch.zeros(num_tokens, len(plan.counts_E), dtype=plan.weights_N.dtype)
    expert_N = torch.repeat_interleave(torch.arange(len(plan.counts_E)), plan.counts_E)
    rows = len(expert_N)
    return gates_TE.index_put((plan.token_ids_N[:rows], expert_N), plan.weights_N[:rows], accumulate=True)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("router", ROUTERS)
def test_plan_and_record_equal_the_oracle(router, kind):
    router = make_layer(router, kind).router
    x_TD, info, _ = make_batch(kind, 0)
    plan, record = router(x_TD, info)
    weights = [weight.detach() for weight in router.parameters()]
    close(dense(plan, TOKENS).detach(), reference.gates(router, x_TD.detach(), weights, info), "gates")
    rows = int(plan.counts_E.sum())
    assert len(plan.token_ids_N) == len(plan.weights_N) >= rows
    assert not plan.complete or rows == len(plan.token_ids_N)
    assert record.plan is plan and record.layer == 3
    seen = torch.cat([part.token_V for part in record.routings])
    assert sorted(seen.tolist()) == info.valid_T.nonzero().flatten().tolist()
    if len(record.routings) == 2:
        assert [set(info.modality_T[part.token_V].tolist()) - {m} for m, part in enumerate(record.routings)] == [
            set()
        ] * 2


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(
    "router", [name for name, raw in ROUTERS.items() if raw["type"] in ("top_k", "null_experts", "deepseek_v3")]
)
def test_what_token_choice_records_equals_the_oracle(router, kind):
    """Chosen and kept assignments and gate values are compared. Null assignments do not use an expert's capacity."""
    router = make_layer(router, kind).router
    x_TD, info, _ = make_batch(kind, 0)
    _, record = router(x_TD, info)
    (part,) = record.routings
    decision = reference.decide(router, x_TD.detach(), [p.detach() for p in router.parameters()], info)
    assert _pairs(part.token_V, part.chosen_VC) == decision.chosen
    assert _pairs(part.token_V, part.kept_VE) == decision.kept
    of_expert = [sum(e == expert for _, e in decision.kept) for expert in range(8)]
    wished = [sum(c == expert for _, c in decision.chosen) for expert in range(8)]
    assert record.load_E.tolist() == of_expert
    assert record.dropped_E.tolist() == [a - b for a, b in zip(wished, of_expert)]
    of_token = [sum(t == token for t, _ in decision.kept) for token in range(TOKENS)]
    assert record.experts_of_T(TOKENS).tolist() == of_token
    logits_VC = torch.stack([x_TD[t] @ router.gate.weight.T for t in part.token_V.tolist()] or [part.logits_VC.sum(0)])
    if len(part.token_V):
        close(part.logits_VC, logits_VC if router.gate.bias is None else logits_VC + router.gate.bias, "logits")


def _pairs(token_V, mask_VC):
    return {(int(token_V[v]), c) for v, c in mask_VC.nonzero().tolist()}


def test_the_cases_drop_take_nulls_and_leave_tokens_without_an_expert():
    """Otherwise the comparisons above would prove little."""
    for name in ("by_position", "by_probability", "null_full"):
        x_TD, info, _ = make_batch("skewed", 0)
        _, record = make_layer(name, "skewed").router(x_TD, info)
        assert record.dropped_E.sum() > 0, name
    x_TD, info, _ = make_batch("mixed", 0)
    _, record = make_layer("null").router(x_TD, info)
    experts = set(record.experts_of_T(TOKENS)[info.valid_T].tolist())
    assert experts >= {0, 1, 2}


def test_padding_to_capacity_gives_static_shapes_and_the_same_layer():
    """Every expert gets the same number of rows for any tokens; outputs and gradients are bitwise equal."""
    shapes = set()
    for kind in BATCHES:
        results = {}
        for pad in (False, True):
            layer = make_layer("padded", kind)
            layer.router.settings = layer.router.settings.model_copy(update={"pad_to_capacity": pad})
            x_TD, info, loss_TD = make_batch(kind, 0)
            plan, _ = layer.router(x_TD, info)
            y_TD, _ = layer(x_TD, info)
            (y_TD * loss_TD).sum().backward()
            results[pad] = [y_TD, x_TD.grad, *(p.grad for p in layer.parameters())]
        shapes.add((tuple(plan.token_ids_N.shape), tuple(plan.counts_E.tolist())))
        for plain, padded in zip(results[False], results[True]):
            close(padded, plain, kind)
    assert shapes == {((8 * 8,), (8,) * 8)}  # 2 groups of ceil(1.2 * 12 * 2 / 8) = 4


def test_null_experts_with_copied_columns_tie_and_are_chosen_at_random():
    """AdaMoE initialises null columns as copies of the experts' columns, so both are chosen equally often."""
    router = make_layer("null").router
    with torch.no_grad():
        router.gate.weight[8:] = router.gate.weight[:8]
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(6000, WIDTH, generator=generator, dtype=torch.float64)
    info = make_info(torch.zeros(6000, dtype=torch.int64), torch.ones(6000, dtype=torch.bool), num_groups=1)
    _, record = router(x_TD, info)
    share = record.load_E.sum().item() / (3 * 6000)
    assert abs(share - 0.5) < 0.02  # k n / (n + m) = 1.5 true experts a token


def test_dropping_by_probability_is_not_causal():
    built = {
        name: build_router(router_settings(ROUTERS[name]), SITE).causal
        for name in ("by_position", "by_probability", "null")
    }
    assert built == {"by_position": True, "by_probability": False, "null": True}


def test_what_layouts_and_losses_ask_of_a_router():
    built = {name: build_router(router_settings(raw), SITE) for name, raw in ROUTERS.items()}
    causal = {
        "top_1",
        "top_2_sigmoid",
        "top_8",
        "biased",
        "by_position",
        "padded",
        "null",
        "null_in_text",
        "null_of_true",
        "null_of_chosen",
    }
    causal |= {"deepseek", "deepseek_ungrouped"}
    assert {name for name, router in built.items() if router.causal} == causal
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
    """Return the set of (expert, token id)."""
    expert_N = torch.repeat_interleave(torch.arange(len(plan.counts_E)), plan.counts_E)
    return set(zip(expert_N.tolist(), info.token_id_T[plan.token_ids_N[: len(expert_N)]].tolist()))


@pytest.mark.parametrize("router", ["moe_8x", "4t4i", "6t2i"])
def test_identical_tokens_are_chosen_alike_in_every_layout(router):
    """Four groups in one micro-batch are routed as one by one, even if the inputs round differently."""
    router = build_router(router_settings(ROUTERS[router]), SITE)
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
        plan, _ = build_router(router_settings(ROUTERS["moe_8x"]), site)(x_TD, info)
        choices.append([frozenset(tokens.tolist()) for tokens in plan.token_ids_N.split(plan.counts_E.tolist())])
    assert len({choice for layer in choices for choice in layer}) == 3 * 8
    assert len(frozenset.union(*choices[0])) > 32  # not the same eighth for every expert


def test_selection_does_not_depend_on_padding_beside_it():
    router = build_router(router_settings(ROUTERS["4t4i"]), SITE)
    x_TD, info, _ = make_batch("mixed", 0)
    x_TD = x_TD.detach().float()
    changed = torch.where(info.valid_T[:, None], x_TD, torch.full_like(x_TD, 1e4))
    for first, second in zip(*(vars_of(router(x, info)[0]) for x in (x_TD, changed))):
        assert torch.equal(first, second)


def vars_of(plan):
    return plan.token_ids_N, plan.weights_N, plan.counts_E


@pytest.mark.parametrize("router", ROUTERS)
def test_routing_stays_float32_under_bf16_and_autocast(router):
    """With bf16 parameters and inputs, with or without autocast, the plan is the float32 plan of the same values."""
    router = build_router(router_settings(ROUTERS[router]), SITE).bfloat16()
    x_TD, info, _ = make_batch("mixed", 0)
    x_TD = x_TD.detach().bfloat16()
    plan, record = router(x_TD, info)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = router(x_TD, info)
    exact, _ = router.float()(x_TD.float(), info)
    assert plan.weights_N.dtype == torch.float32
    assert all(part.logits_VC.dtype == part.probs_VC.dtype == torch.float32 for part in record.routings)
    for other in (under_autocast, exact):
        assert all(torch.equal(a, b) for a, b in zip(vars_of(plan), vars_of(other)))


def test_losses_reach_the_gate_through_the_record():
    router = build_router(router_settings(ROUTERS["4t4i"]), SITE).double()
    x_TD, info, _ = make_batch("mixed", 0)
    _, record = router(x_TD, info)
    sum(part.probs_VC.sum() for part in record.routings).backward()
    text_TD = x_TD.detach()[info.valid_T & (info.modality_T == TEXT)]
    weight_ED = router.text.gate.weight.detach().clone().requires_grad_()
    (text_TD @ weight_ED.T).sigmoid().sum().backward()
    close(router.text.gate.weight.grad, weight_ED.grad, "gradient of the text gate")


def test_non_finite_inputs_do_not_break_the_plan():
    """The engine handles a non-finite loss, so all ranks must be able to compute it."""
    router = build_router(router_settings(ROUTERS["4t4i"]), SITE)
    x_TD, info, _ = make_batch("mixed", 0)
    clean, _ = router(x_TD.float(), info)
    broken, _ = router(torch.full_like(x_TD, torch.nan).float(), info)
    assert torch.equal(clean.counts_E, broken.counts_E)


def test_every_router_of_a_recipe_is_built_by_a_class():
    assert set(RouterSettings.kinds.values()) == set(REGISTRY)


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"type": "top_kk"}, r"key 'model.ffn.router.type': there is no router 'top_kk' \(did you mean 'top_k'\?\)"),
        ({}, "there is no router 'None': one of top_k, null_experts, expert_choice, modality"),
        ({"type": "top_k", "num_experts": 4, "topk": 2}, "unknown key 'model.ffn.router.topk'"),
        ({"type": "top_k", "num_experts": 4}, "key 'model.ffn.router.top_k' is missing"),
        ({"type": "top_k", "num_experts": 2, "top_k": 3}, "top_k=3 is more than the router's 2 columns"),
        (
            {"type": "null_experts", "num_experts": 2, "num_null_experts": 1, "top_k": 4},
            "top_k=4 is more than the router's 3 columns",
        ),
        ({"type": "top_k", "num_experts": 4, "top_k": 1, "pad_to_capacity": True}, "needs a capacity_factor"),
        (
            {"type": "top_k", "num_experts": 4, "top_k": 1, "renormalize": True, "weighting": "straight_through"},
            "weighting=straight_through leaves nothing to renormalize",
        ),
        ({"type": "expert_choice", "num_experts": 0}, "'model.ffn.router.num_experts'"),
        ({"type": "expert_choice", "num_experts": 4, "capacity_factor": 0}, "'model.ffn.router.capacity_factor'"),
        ({"type": "expert_choice", "num_experts": 4, "capacity_factor": math.inf}, "should be a finite number"),
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


def test_gumbel_noise_is_for_training_alone():
    """There is no noise in evaluation or with a frozen gate. Every token id, layer and expert has its own draw."""
    noisy = {"type": "expert_choice", "num_experts": 8, "gumbel_noise": True}
    x_TD, info, _ = make_batch("mixed", 0)
    x_TD = x_TD.detach().float()

    def logits(raw, *, site=SITE, mode=lambda router: None, info=info):
        router = build_router(router_settings(raw), site)
        mode(router)
        return router(x_TD, info)[1].routings[0].logits_VC.detach()

    plain = logits({**noisy, "gumbel_noise": False})
    assert torch.equal(logits(noisy, mode=lambda router: router.eval()), plain)
    assert torch.equal(logits(noisy, mode=lambda router: router.requires_grad_(False)), plain)
    noise = logits(noisy) - plain
    assert noise.abs().min() > 1e-4 and noise.flatten().unique().numel() == noise.numel()
    later = make_info(info.modality_T, info.valid_T, first_id=TOKENS)
    for other in (logits(noisy, site=SITE.child("x")), logits(noisy, info=later)):
        assert (other - plain - noise).abs().median() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_logit_that_moves_by_its_margin_changes_its_selection(dtype):
    """Moving one of several close logits changes its selection just above its margin, and nothing just below it."""
    generator = torch.Generator().manual_seed(0)
    cell_VC, within_VC = torch.randint(-3, 4, (12, 5), generator=generator), torch.rand(12, 5, generator=generator)
    logits_VC, taken = (cell_VC + within_VC / 2).to(dtype) * 2.0**-14, 4
    info = make_info(torch.zeros(12, dtype=torch.int64), torch.ones(12, dtype=torch.bool))

    def select(logits_VC):
        keys_VC = selection_keys(logits_VC, info, 7)
        chosen_VC = torch.zeros_like(logits_VC, dtype=torch.bool)
        return keys_VC, chosen_VC.scatter(0, keys_VC.topk(taken, dim=0).indices, True)

    keys_VC, chosen_VC = select(logits_VC)
    margin_VC = selection_margins(logits_VC, keys_VC, chosen_VC)
    assert 0 < margin_VC.min() < 2.0**-16 and margin_VC.max() < 2.0**-10
    for row in range(12):
        for column in range(5):
            for size, changes in ((1 - 1e-3, False), (1 + 1e-3, True)):
                moved_VC = logits_VC.clone()
                way = -1 if chosen_VC[row, column] else 1
                moved_VC[row, column] += way * margin_VC[row, column] * size
                assert (select(moved_VC)[1][row, column] != chosen_VC[row, column]) == changes, (row, column, size)
    everyone = torch.ones_like(chosen_VC)
    assert selection_margins(logits_VC, keys_VC, everyone).isinf().all()
    assert selection_margins(logits_VC, keys_VC, ~everyone).isinf().all()
