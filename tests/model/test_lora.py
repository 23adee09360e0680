"""LoRA on every kind of weight: against the same model with merged weights, and with dropout against plain loops."""

import pytest
import torch

from moe_dist.config.model_section import LORA_TARGETS, ModelConfig, MoEFFN
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.model.moe.moe_layer import build_moe_layer
from moe_dist.model.moe.swiglu import SwiGLU
from moe_dist.model.site import Site
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.support import routing_reference as reference
from tests.support.model_batches import DENSE, LLAMA, LORA_EXPERTS, MOMA, VOCAB, make_batch, model_config

ALPHA, RANK = reference.LORA_ALPHA, 5
SHARED = {
    "type": "moe",
    "hidden_size": 24,
    "shared_expert": {"hidden_size": 40, "gate": True},
    "router": {"type": "top_k", "num_experts": 4, "top_k": 2, "bias": True},
}
MIXED = {"ffn": SHARED, "layers": {"0": {"ffn": {"type": "dense", "hidden_size": 56, "bias": True}}}}
BIASES = {**LLAMA, "attention_bias": "all"}
CASES = {
    **{target: (MIXED | LLAMA, [target]) for target in LORA_TARGETS},
    "everything": (MIXED | BIASES, ["*"]),
    "everything, chameleon": ({"ffn": MOMA}, ["*"]),
    "q and v, dense": ({"ffn": DENSE} | BIASES, ["attention.q", "attention.v", "ffn.*"]),
    "beside LoRA experts": ({"ffn": LORA_EXPERTS}, ["attention.o", "router"]),
}


def lora_of(targets, **more):
    return {"rank": RANK, "alpha": ALPHA, "targets": targets} | more


def build(config):
    """Make a float64 model of which every parameter matters, the deltas included."""
    model = Transformer(config, VOCAB, Layout(), seed=3).double()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith((".b", "bias")):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def delta(weights, name, part):
    return ALPHA / RANK * weights[f"{name}.{part}.a"] @ weights[f"{name}.{part}.b"]


def merged(name, weight, weights, config):
    """Add the deltas of a weight, row by row, from their definition: x W^T + (alpha / r) x A B."""
    module, _, kind = name.rpartition(".")
    found = {key.removeprefix(f"{module}.lora.")[:-2] for key in weights if key.startswith(f"{module}.lora.")}
    if ".experts" in name:
        parts = ("gate", "up") if kind == "gate_up" else ("down",)
        size = weight.shape[2] // len(parts)
        blocks = [
            delta(weights, f"{module}.lora", p) if p in found else weight.new_zeros(*weight.shape[:2], size)
            for p in parts
        ]
        return weight + torch.cat(blocks, dim=2)
    if "router" in module:
        return weight + (ALPHA / RANK * weights[f"{module}.lora.a"] @ weights[f"{module}.lora.b"]).T
    if kind == "bias":
        return weight
    rows = {part: iter(delta(weights, f"{module}.lora", part).T) for part in found}
    order = ["o" if module.endswith("proj") else "down"] * len(weight)
    if module.endswith("gate_up"):
        order = ["gate"] * (len(weight) // 2) + ["up"] * (len(weight) // 2)
    if module.endswith("linear_qkv"):
        heads, size = config.num_heads // config.query_groups, config.size_per_head
        order = (["q"] * heads * size + ["k"] * size + ["v"] * size) * config.query_groups
    return torch.stack([row + next(rows[part]) if part in rows else row for part, row in zip(order, weight)])


def has_deltas(name, weights):
    module, _, kind = name.rpartition(".")
    of_module = [key for key in weights if key.startswith(f"{module}.lora.")]
    return kind != "bias" and ".lora" not in name and ".experts.base" not in name and bool(of_module)


@pytest.mark.parametrize(("changes", "targets"), CASES.values(), ids=CASES)
def test_a_model_with_lora_equals_the_merged_model_forward_and_backward(changes, targets):
    config = model_config(**changes, lora=lora_of(targets))
    model, batch = build(config), make_batch([9, 14, 3])
    plain = Transformer(config.model_copy(update={"lora": None}), VOCAB, Layout(), seed=3).double()
    weights = dict(model.named_parameters())
    own = [name for name in plain.state_dict() if has_deltas(name, weights)]
    together = {
        name: merged(name, weights[name], weights, config) if name in own else weights[name]
        for name, _ in plain.named_parameters()
    }
    upstream = torch.randn(26, VOCAB, dtype=torch.float64)
    output = model(batch.tokens_T, batch.info).logits_TV
    expected = torch.func.functional_call(plain, together, (batch.tokens_T, batch.info)).logits_TV
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)

    trained = [name for name, weight in weights.items() if weight.requires_grad]
    assert any(".lora." in name for name in trained) and not set(own) & set(trained), "what has deltas is frozen"
    gradients, theirs = (
        torch.autograd.grad(logits, [weights[name] for name in trained], upstream) for logits in (output, expected)
    )
    for name, gradient, other in zip(trained, gradients, theirs):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-9, msg=name)
    moved = {name: gradient.abs().max() for name, gradient in zip(trained, gradients) if ".lora." in name}
    assert min(moved.values()) > 1e-6, "every delta matters"
    with torch.no_grad():
        untouched = torch.func.functional_call(plain, {n: weights[n] for n in together}, (batch.tokens_T, batch.info))
        assert (untouched.logits_TV - output).abs().max() > 1e-3


def low_rank(x_D, lora, token_id, rate, expert=None):
    """Compute (alpha / r) dropout(x) A B of one token."""
    a, b = (lora.a, lora.b) if expert is None else (lora.a[expert], lora.b[expert])
    return ALPHA / RANK * (reference.dropped(x_D, lora.key, token_id, rate) @ a) @ b


def naive_swiglu(x_D, ffn, token_id, rate):
    gate_up, down = ffn.gate_up, ffn.down
    gate_D, up_D = (gate_up.weight @ x_D).chunk(2)
    gate_D = gate_D + low_rank(x_D, gate_up.lora["gate"], token_id, rate)
    up_D = up_D + low_rank(x_D, gate_up.lora["up"], token_id, rate)
    h_F = gate_D / (1 + torch.exp(-gate_D)) * up_D
    return down.weight @ h_F + low_rank(h_F, down.lora["down"], token_id, rate)


def naive_layer(x_TD, layer, info, rate):
    """Compute a top-2 expert layer with a shared expert and LoRA everywhere, token by token."""
    gate, experts, shared = layer.router.gate, layer.experts, layer.shared_expert
    outputs = []
    for x_D, token_id in zip(x_TD, info.token_id_T.tolist()):
        logits_E = gate.weight @ x_D + gate.bias + low_rank(x_D, gate.lora, token_id, rate)
        weights_k, chosen_k = logits_E.softmax(0).topk(2)
        y_D = naive_swiglu(x_D, shared.ffn, token_id, rate) * torch.sigmoid(shared.gate.weight[0] @ x_D)
        for weight, e in zip(weights_k, chosen_k.tolist()):
            gate_F, up_F = (x_D @ experts.gate_up[e]).chunk(2)
            gate_F = gate_F + low_rank(x_D, experts.lora["gate"], token_id, rate, e)
            up_F = up_F + low_rank(x_D, experts.lora["up"], token_id, rate, e)
            h_F = gate_F / (1 + torch.exp(-gate_F)) * up_F
            y_D = y_D + weight * (h_F @ experts.down[e] + low_rank(h_F, experts.lora["down"], token_id, rate, e))
        outputs.append(y_D)
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_dropout_is_seeded_by_the_token_ids_everywhere(kind):
    """Each delta draws its own mask, and evaluation draws none."""
    config = model_config(SHARED, lora=lora_of(["*"], dropout=0.3))
    site = Site(hidden_size=32, layer=1, seed=5, init_std=0.3, name="layers.1.ffn", lora=config.lora)
    ffn = validate(MoEFFN, SHARED, "test")
    layer = build_moe_layer(ffn, site, Layout()) if kind == "experts" else SwiGLU(model_config().ffn, site)
    layer = layer.double()
    torch.manual_seed(0)
    for name, parameter in layer.named_parameters():
        if name.endswith((".b", "bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    info = make_batch([7, 12], first_token_id=500).info
    x_TD = torch.randn(19, 32, dtype=torch.float64, requires_grad=True)
    trained = [x_TD, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    upstream = torch.randn(19, 32, dtype=torch.float64)

    def naive(rate):
        if kind == "experts":
            return naive_layer(x_TD, layer, info, rate)
        return torch.stack([naive_swiglu(x, layer, int(i), rate) for x, i in zip(x_TD, info.token_id_T)])

    output, expected = layer(x_TD, info)[0], naive(0.3)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    pairs = zip(*(torch.autograd.grad(y, trained, upstream) for y in (output, expected)))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    evaluated = layer.eval()(x_TD, info)[0]
    torch.testing.assert_close(evaluated, naive(0.0), rtol=1e-9, atol=1e-9)
    assert (evaluated - output).abs().max() > 0.01


@pytest.mark.parametrize(
    ("ffn", "targets", "sentence"),
    [
        (DENSE, ["atention.q"], r"key 'lora.targets': there is no 'atention.q' \(did you mean 'attention.q'\?\)"),
        (DENSE, ["mlp"], "there is no 'mlp': the names are attention.q, attention.k, .* matches any text"),
        (DENSE, ["experts.*"], r"lora.targets: the model has no 'experts.\*', only attention, ffn$"),
        (SHARED, ["ffn.up"], "lora.targets: the model has no 'ffn.up', only attention, experts, shared_expert, router"),
        (LORA_EXPERTS, ["experts.up"], "lora.targets: the model has no 'experts.up', only attention, router"),
        (MOMA | {"slices": 2}, ["*"], r"lora.targets: experts in slices \(ffn.slices=2\) cannot have LoRA"),
        (DENSE, [], "lora.targets"),
    ],
)
def test_targets_that_do_not_exist_are_refused(ffn, targets, sentence):
    with pytest.raises(UserError, match=sentence):
        model_config(ffn, lora=lora_of(targets))


def test_a_checkpoint_of_before_has_lora_on_attention():
    config = model_config(lora={"rank": 2, "alpha": 4.0})
    assert config.lora.targets == ("attention.*",)
    assert validate(ModelConfig, config.model_dump(mode="json"), "test") == config
