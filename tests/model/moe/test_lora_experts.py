"""LoRA experts against plain loops: forward and backward in float64, alone, replicated and spread over ranks."""

import pytest
import torch
from torch import nn

from moe_dist.config.model_section import LoRAExpertsConfig, MoEFFN
from moe_dist.config.routers import router_settings
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.model.lora import LowRank
from moe_dist.model.moe.experts import HeldExperts
from moe_dist.model.moe.lora_experts import LoRAExperts
from moe_dist.model.moe.moe_layer import build_moe_layer
from moe_dist.model.moe.router_registry import build_router
from moe_dist.model.site import Site
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from tests.support import routing_reference as reference
from tests.support.distributed import run_ranks
from tests.support.model_batches import model_config
from tests.support.moe_cases import BATCHES, EXPERT_WIDTH, WIDTH, close, make_batch

CPU = torch.device("cpu")
TOP_1 = {"type": "top_k", "num_experts": 4, "top_k": 1}
ROUTERS = {
    "straight_through": TOP_1 | {"bias": True, "weighting": "straight_through"},
    "weighted": TOP_1 | {"bias": True},
    "modality": {
        "type": "modality",
        "text": TOP_1 | {"num_experts": 3, "weighting": "straight_through"},
        "image": TOP_1 | {"num_experts": 1, "score": "sigmoid"},
    },
}


def make_layer(router, dropout=0.0, kind="mixed", layout=None, rank=5):
    """Make a float64 layer whose B and router biases are not zero, so that errors in them are found."""
    ffn = validate(
        MoEFFN,
        {
            "type": "moe",
            "hidden_size": EXPERT_WIDTH,
            "router": ROUTERS[router],
            "experts": {"type": "lora", "rank": rank, "alpha": reference.LORA_ALPHA, "dropout": dropout},
        },
        "test",
    )
    site = Site(hidden_size=WIDTH, layer=3, seed=5, init_std=0.3, output_std=0.2, name="layers.3.ffn")
    layer = build_moe_layer(ffn, site, layout or Layout()).double()
    for number, (name, parameter) in enumerate(layer.named_parameters()):
        if name.endswith("bias") or name.endswith(".b"):
            generator = torch.Generator().manual_seed(number)
            ids = getattr(parameter, "expert_ids", None)
            everyone = torch.randn((4, *parameter.shape[1:]) if ids else parameter.shape, generator=generator) * 0.3
            parameter.data.copy_(everyone[list(ids)] if ids else everyone)
    if kind == "skewed":
        for parameter in layer.router.parameters():
            if parameter.dim() == 2:
                parameter.data.abs_().mul_(-1)[0].mul_(-1)
    return layer


def run_layer(layer, kind, rank):
    x_TD, info, loss_TD = make_batch(kind, rank)
    y_TD, _ = layer(x_TD, info)
    (y_TD * loss_TD).sum().backward()
    gradients = {}
    for name, parameter in layer.named_parameters():
        if hasattr(parameter, "expert_ids"):
            gradients |= {(name, expert): row for expert, row in zip(parameter.expert_ids, parameter.grad)}
        else:
            gradients[name] = parameter.grad
    return y_TD.detach(), x_TD.grad, gradients


def run_on_rank(rank, router, dropout, kind, expert):
    return run_layer(make_layer(router, dropout, kind, make_layout(expert=expert, device=CPU)), kind, rank)


def assert_equals_oracle(results, router, dropout, kind):
    """Compare outputs and gradients of all ranks. An expert's gradient is the sum over the ranks that hold it."""
    layer = make_layer(router, dropout, kind)
    weights = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    gates = [value for name, value in weights.items() if name.startswith("router")]
    for rank, (y_TD, x_grad, _) in enumerate(results):
        x_TD, info, loss_TD = make_batch(kind, rank)
        gates_TE = reference.gates(layer.router, x_TD, gates, info)
        expected = reference.lora_layer(x_TD, gates_TE, info, layer.experts, weights)
        (expected * loss_TD).sum().backward()
        close(y_TD, expected.detach(), "y")
        close(x_grad, x_TD.grad, "gradient of x")
    for name, weight in weights.items():
        if ".base." in name:
            assert all(gradients[name] is None for *_, gradients in results), f"{name} is frozen and has a gradient"
            continue
        whole = torch.zeros_like(weight) if weight.grad is None else weight.grad
        rows = {(name, e): row for e, row in enumerate(whole)} if ".lora." in name else {name: whole}
        for key, expected in rows.items():
            got = [gradients[key] for *_, gradients in results if key in gradients]
            close(sum(got), expected, f"gradient of {key}")


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("router", ROUTERS)
def test_one_process(router, dropout, kind):
    layer = make_layer(router, dropout, kind)
    assert_equals_oracle([run_layer(layer, kind, 0)], router, dropout, kind)


@pytest.mark.parametrize("expert", [1, 2], ids=["replicated", "spread"])
@pytest.mark.parametrize(
    "router, kind", [("straight_through", "mixed"), ("weighted", "rank_0_padding"), ("modality", "one_sided")]
)
def test_two_ranks(router, kind, expert):
    assert_equals_oracle(run_ranks(run_on_rank, 2, router, 0.3, kind, expert), router, 0.3, kind)


def test_an_expert_without_tokens_has_zero_gradients():
    results = run_ranks(run_on_rank, 2, "straight_through", 0.3, "skewed", 2)
    assert_equals_oracle(results, "straight_through", 0.3, "skewed")
    busy, idle = (
        {key: value.abs().max().item() for key, value in gradients.items() if key[1] in (0, 1, 2, 3)}
        for *_, gradients in results
    )
    assert max(busy.values()) > 0.1
    assert len(idle) == 12 and not any(idle.values()), "an expert without tokens got a gradient"


def test_the_unweighted_form_is_the_chosen_expert_alone_and_still_teaches_the_router():
    layer = make_layer("straight_through")
    y_TD, _, gradients = run_layer(layer, "mixed", 0)
    x_TD, info, _ = make_batch("mixed", 0)
    plan, _ = layer.router(x_TD, info)
    assert torch.equal(plan.weights_N.detach(), torch.ones_like(plan.weights_N))
    rows_RD, counts_e = x_TD.index_select(0, plan.token_ids_N), tuple(plan.counts_E.tolist())
    alone = layer.experts(rows_RD, counts_e, torch.ones(len(rows_RD)))
    close(y_TD.index_select(0, plan.token_ids_N), alone.detach(), "y")
    assert gradients["router.gate.weight"].abs().max() > 0.1


def test_untrained_experts_are_the_dense_base():
    layer = make_layer("weighted", dropout=0.5)
    for delta in layer.experts.lora.values():
        nn.init.zeros_(delta.b)
    x_TD, info, _ = make_batch("mixed", 0)
    y_TD, _ = layer(x_TD, info)
    dense_TD, _ = layer.experts.base(x_TD, info)
    close(y_TD.detach(), (dense_TD * info.valid_T[:, None]).detach(), "y")


def test_dropout_is_off_in_evaluation_and_its_ids_stay_at_home():
    layer, x_TD, info = make_layer("weighted", 0.3), *make_batch("mixed", 0)[:2]
    given = []
    dispatch = layer.dispatcher.dispatch
    layer.dispatcher.dispatch = lambda x_TD, plan, ids: given.append(ids) or dispatch(x_TD, plan, ids)
    trained, again = layer(x_TD, info)[0], layer(x_TD, info)[0]
    evaluated = layer.eval()(x_TD, info)[0]
    without = make_layer("weighted", 0.0)(x_TD, info)[0]
    assert torch.equal(trained, again) and torch.equal(evaluated, without)
    assert (trained - evaluated).abs().max() > 0.01
    assert given[0] is given[1] is info.token_id_T and given[2] is None


def make_experts(number, hidden_size, size, **lora):
    site = Site(hidden_size=hidden_size, layer=0, seed=1, init_std=0.3, output_std=0.2, name="experts")
    settings = LoRAExpertsConfig(type="lora", alpha=8.0, **lora)
    return LoRAExperts(settings, HeldExperts(expert_ids=tuple(range(number)), size=size, site=site))


def run_grouped(rank, dtype):
    experts = make_experts(3, 16, 24, rank=rank, dropout=0.25)
    generator = torch.Generator().manual_seed(0)
    for delta in experts.lora.values():
        delta.b.data.copy_(torch.randn(delta.b.shape, generator=generator) * 0.3)
    rows = torch.randn(11, 16, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(11, generator=generator).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    experts.to(dtype)
    y = experts(rows, (4, 0, 7), weights, torch.arange(11))
    (y.double() * torch.linspace(-1, 1, 16, dtype=torch.float64)).sum().backward()
    return [y.detach(), rows.grad, weights.grad, *(p.grad for p in experts.lora.parameters())]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rank", [*range(1, 17), 20, 31, 32])
def test_grouped_products_take_every_rank(rank, dtype, tolerance):
    for expected, got in zip(run_grouped(rank, torch.float64), run_grouped(rank, dtype)):
        assert got.isfinite().all()
        assert (got.double() - expected).norm() <= tolerance * max(1.0, float(expected.norm()))


def test_a_starts_as_kaiming_scales_it_and_b_at_zero():
    experts = make_experts(2, 192, 256, rank=32)
    linear = nn.Linear(192, 4096)  # torch draws its weights by kaiming_uniform_(a=sqrt(5)), as LoRA's code draws A
    assert experts.lora["gate"].a.std().item() == pytest.approx(linear.weight.std().item(), rel=0.03)
    assert experts.lora["down"].a.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.03)
    assert not torch.equal(experts.lora["gate"].a[0], experts.lora["gate"].a[1])
    assert not any(delta.b.any() for delta in experts.lora.values())


@pytest.mark.parametrize(
    "router",
    [
        TOP_1 | {"top_k": 2},
        TOP_1 | {"capacity_factor": 2.0},
        {"type": "expert_choice", "num_experts": 4},
        {"type": "null_experts", "num_experts": 4, "num_null_experts": 2, "top_k": 1},
        {"type": "modality", "text": TOP_1, "image": TOP_1 | {"top_k": 2}},
    ],
    ids=lambda router: "-".join(map(str, router)),
)
def test_other_numbers_of_experts_a_token_are_refused(router):
    ffn = MoEFFN(type="moe", hidden_size=8, router=router, experts={"type": "lora", "rank": 2, "alpha": 2.0})
    sentence = r"model\.ffn\.experts\.type=lora needs exactly 1 expert for every token: model\.ffn\.router must"
    with pytest.raises(UserError, match=sentence):
        build_moe_layer(ffn, Site(hidden_size=16, layer=0, seed=0, init_std=1, name="ffn"), Layout())


def test_routers_say_how_many_experts_a_token_gets():
    def count(raw):
        site = Site(hidden_size=16, layer=0, seed=0, init_std=1, name="router")
        return build_router(router_settings(raw), site).experts_per_token

    assert [count(router) for router in ROUTERS.values()] == [1, 1, 1]
    assert count(TOP_1 | {"top_k": 3}) == 3


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"rank": 0}, r"key 'ffn\.experts\.rank': input should be greater than 0, got 0"),
        ({"dropout": 1.0}, r"key 'ffn\.experts\.dropout': input should be less than 1, got 1\.0"),
        ({"alhpa": 1.0}, r"unknown key 'ffn\.experts\.alhpa' \(did you mean 'alpha'\?\)"),
        ({"type": "lroa"}, r"key 'ffn\.experts\.type': there is no 'lroa' \(did you mean 'lora'"),
    ],
)
def test_bad_settings_are_named(change, sentence):
    experts = {"type": "lora", "rank": 4, "alpha": 8.0} | change
    with pytest.raises(UserError, match=sentence):
        model_config({"type": "moe", "hidden_size": 8, "router": TOP_1, "experts": experts})


def test_every_delta_of_a_model_has_masks_of_its_own():
    lora = {"rank": 2, "alpha": 2.0, "dropout": 0.1}
    ffn = {"type": "moe", "hidden_size": 8, "router": TOP_1, "experts": {"type": "lora", **lora}}
    models = [Transformer(model_config(ffn, lora=lora), 10, Layout(), seed) for seed in (0, 1)]
    keys = [module.key for model in models for module in model.modules() if isinstance(module, LowRank)]
    assert len(keys) == len(set(keys)) == 2 * 3 * (3 + 4)
