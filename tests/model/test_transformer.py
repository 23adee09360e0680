"""The whole model: against plain PyTorch, packing, causality, recomputation, initialisation, precision."""

import math

import pytest
import torch

from moe_dist.core.routing_plan import RoutingRecord
from moe_dist.core.seeding import fold_key, seeded_normal_
from moe_dist.losses.language import language_loss
from moe_dist.model import rope
from moe_dist.model.lora import LowRank
from moe_dist.model.moe.depth_router import DepthRouter
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.support import reference_model
from tests.support import routing_reference as reference
from tests.support.model_batches import (
    DENSE,
    EXPERT_CHOICE,
    LLAMA,
    LORA,
    LORA_EXPERTS,
    MOMA,
    TOP_K,
    VOCAB,
    make_batch,
    model_config,
)

FFNS = pytest.mark.parametrize("ffn", [DENSE, TOP_K, EXPERT_CHOICE, MOMA], ids=["dense", "top_k", "moe_8x", "moma"])


def build(ffn=DENSE, **changes) -> Transformer:
    return Transformer(model_config(ffn, **changes), VOCAB, Layout(), seed=1)


def gradients(model, batch):
    model.zero_grad()
    loss = language_loss(model(batch.tokens_T, batch.info).logits_TV, batch).total
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [{"norm": "swin"}, {"norm": "pre"}, {"tie_embeddings": True}, LLAMA, {**LLAMA, "tie_embeddings": True}],
    ids=["swin", "pre", "tied", "llama", "tied-llama"],
)
def test_dense_model_equals_plain_pytorch_in_float64(changes):
    model = build(**changes).double()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    lengths = [9, 1, 20, 14]
    batch = make_batch(lengths)
    loss, ours = gradients(model, batch)

    parameters = {name: parameter.detach().requires_grad_() for name, parameter in model.named_parameters()}
    pieces = batch.tokens_T.split(lengths)
    logits = torch.cat([reference_model.transformer(tokens, parameters, model.config) for tokens in pieces])
    probs = torch.softmax(logits, dim=1)[torch.arange(len(logits)), batch.targets_T]
    expected = -probs.log()[batch.loss_mask_T].sum()
    theirs = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values()))))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
    assert ("output.weight" in ours) != model.config.tie_embeddings
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("norm", ["swin", "pre"])
@pytest.mark.parametrize("ffn", [TOP_K, EXPERT_CHOICE, MOMA], ids=["top_k", "moe_8x", "moma"])
def test_expert_model_equals_plain_pytorch_in_float64(ffn, norm):
    """Loss and every gradient, including routers and experts, are compared on one document in one selection group."""
    model, batch = build(ffn, norm=norm).double(), make_batch([21])
    loss, ours = gradients(model, batch)
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in model.named_parameters()}

    def feed(layer, x_TD):
        own = f"layers.{layer}.ffn."
        gate_weights = [value for name, value in parameters.items() if name.startswith(f"{own}router.")]
        gates_TE = reference.gates(model.layers[layer].ffn.router, x_TD, gate_weights, batch.info)
        experts = parameters[f"{own}experts.gate_up"], parameters[f"{own}experts.down"]
        return reference.expert_layer(x_TD, gates_TE, *experts)

    logits = reference_model.transformer(batch.tokens_T, parameters, model.config, feed)
    probs = torch.softmax(logits, dim=1)[torch.arange(len(logits)), batch.targets_T]
    expected = -probs.log()[batch.loss_mask_T].sum()
    theirs = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values()))))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
    for name, gradient in ours.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ffn", [DENSE, TOP_K], ids=["dense", "top_k"])
def test_a_document_alone_gives_the_logits_it_has_in_company(ffn):
    model, lengths = build(ffn).double(), [12, 30, 7]
    packed = make_batch(lengths, padding=11)
    logits = model(packed.tokens_T, packed.info).logits_TV.split([*lengths, 11])
    for number, tokens_T in enumerate(packed.tokens_T.split([*lengths, 11])[:3]):
        alone = make_batch([lengths[number]], first_token_id=sum(lengths[:number]))
        torch.testing.assert_close(model(tokens_T, alone.info).logits_TV, logits[number], rtol=1e-9, atol=1e-9)


@FFNS
def test_causality_is_what_causal_routing_says(ffn):
    """Changing one token leaves earlier logits of a causal model unchanged; with expert choice some change.

    The tolerance is 1e-12, because a product with another number of rows may round differently.
    """
    model, batch = build(ffn).double(), make_batch([40], seed=4)
    changed_T = batch.tokens_T.clone()
    changed_T[30] = (changed_T[30] + 1) % VOCAB
    before, after = (model(tokens_T, batch.info).logits_TV for tokens_T in (batch.tokens_T, changed_T))
    same_T = (before - after).abs().amax(dim=1) < 1e-12
    assert not same_T[30:].any()
    assert bool(same_T[:30].all()) == model.causal_routing == (ffn in (DENSE, TOP_K))


@FFNS
@pytest.mark.parametrize("norm", ["swin", "pre"])
def test_padding_changes_nothing_and_gradients_are_finite(ffn, norm):
    model = build(ffn, norm=norm).double()
    plain, padded = make_batch([20, 12]), make_batch([20, 12], padding=9)
    assert torch.equal(plain.tokens_T, padded.tokens_T[:32]) and padded.info.valid_T.sum() == 32
    (loss, ours), (padded_loss, theirs) = gradients(model, plain), gradients(model, padded)
    torch.testing.assert_close(loss, padded_loss, rtol=1e-10, atol=0)
    for name in ours:
        assert ours[name].isfinite().all()
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-10)


@FFNS
def test_recomputation_gives_identical_gradients_and_records_keep_theirs(ffn):
    batch = make_batch([30, 18, 16], num_groups=2)
    results = []
    for recompute in (False, True):
        model = build(ffn, recompute=recompute)
        output = model(batch.tokens_T, batch.info)
        loss = language_loss(output.logits_TV, batch).total
        for record in output.records:  # as a balance loss would
            loss = loss + sum(part.probs_VC.pow(2).sum() for part in record.routings)
        loss.backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


@pytest.mark.parametrize("embedding", [{}, {"embedding_init_std": 1.0}], ids=["", "embedding"])
@FFNS
def test_initialisation_follows_from_seed_and_name(ffn, embedding):
    config = model_config(ffn)
    deep = config.init_std / math.sqrt(2 * config.num_layers)
    for name, parameter in build(ffn, **embedding).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
            continue
        expected = torch.empty_like(parameter)
        if hasattr(parameter, "expert_ids"):
            expected.expert_ids = parameter.expert_ids
        std = deep if any(key in name for key in ("linear_proj", "down")) else config.init_std
        std = embedding.get("embedding_init_std", std) if name == "embedding.weight" else std
        seeded_normal_(expected, seed=1, name=name, std=std)
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("ffn", [MOMA, TOP_K, LORA_EXPERTS], ids=["moma", "top_k", "lora"])
def test_a_module_draws_with_its_name_in_the_module_tree(ffn):
    """Tie breaking, dropout and initial values are seeded by the names in the module tree."""
    model = build(ffn, depth={"auxiliary": True}, lora=LORA)
    keyed = {name: module for name, module in model.named_modules() if hasattr(module, "key")}
    assert {type(module) for module in keyed.values()} >= {DepthRouter, LowRank}
    for name, module in keyed.items():
        assert module.key == fold_key(1, name, "dropout" if isinstance(module, LowRank) else "ties"), name
    for name, parameter in model.named_parameters():
        if any(part in name for part in (".router.", ".auxiliary.")):
            expected = torch.empty_like(parameter)
            seeded_normal_(expected, seed=1, name=name, std=model.config.init_std)
            assert torch.equal(parameter, expected), name


@FFNS
def test_bf16_keeps_routing_and_rope_in_float32_and_trains(ffn, monkeypatch):
    angles = []
    original = rope.rotary_angles
    monkeypatch.setattr(rope, "rotary_angles", lambda *a, **k: angles.append(original(*a, **k)) or angles[-1])
    batch = make_batch([40, 24])
    exact = build(ffn)(batch.tokens_T, batch.info).logits_TV
    model = build(ffn).bfloat16()  # what DeepSpeed does with the module
    output = model(batch.tokens_T, batch.info)
    assert output.logits_TV.dtype == torch.bfloat16
    assert angles and all(angle.dtype == torch.float32 for angle in angles)
    for record in output.records:
        assert all(part.logits_VC.dtype == part.probs_VC.dtype == torch.float32 for part in record.routings)
    agreement = torch.nn.functional.cosine_similarity(output.logits_TV.float(), exact, dim=1)
    assert agreement.median() > 0.99
    language_loss(output.logits_TV, batch).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@FFNS
def test_meta_device_allocates_nothing(ffn):
    with torch.device("meta"):
        model = build(ffn)
    real = build(ffn)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in model.parameters())


@FFNS
def test_a_forward_pass_leaves_no_state_on_modules(ffn):
    model, batch = build(ffn), make_batch([30, 10])

    def state():
        return {
            f"{name}.{key}": id(value) if isinstance(value, torch.Tensor | RoutingRecord) else repr(value)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if not key.startswith("_")
        }

    before = state()
    records = model(batch.tokens_T, batch.info).records
    assert state() == before
    assert [record.layer for record in records] == ([] if ffn is DENSE else [0, 1, 2])
    assert not list(model.buffers())
