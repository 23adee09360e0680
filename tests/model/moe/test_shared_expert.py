"""The shared expert against the naive formula, forward and backward, and the layers of a model that differ."""

import pytest
import torch

from moe_dist.config.model_section import SharedExpertConfig
from moe_dist.core.errors import UserError
from moe_dist.model.moe.shared_expert import SharedExpert
from moe_dist.model.site import Site
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.support import reference_model
from tests.support.model_batches import TOP_K, VOCAB, make_batch, model_config


@pytest.mark.parametrize("gate", [False, True])
def test_it_equals_the_naive_formula_in_float64(gate):
    site = Site(hidden_size=32, layer=0, seed=0, init_std=0.5, name="shared_expert")
    module = SharedExpert(SharedExpertConfig(hidden_size=24, gate=gate), site).double()
    x = torch.randn(9, 32, dtype=torch.float64, requires_grad=True)
    weights = dict(module.named_parameters())
    assert len(weights) == 2 + gate
    y = module(x, make_batch([9]).info)
    expected = reference_model.swiglu(x, weights["ffn.gate_up.weight"], weights["ffn.down.weight"])
    if gate:
        expected = torch.stack(
            [row * torch.sigmoid(w @ t) for row, t in zip(expected, x) for w in weights["gate.weight"]]
        )
    upstream = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, *weights.values()]
    for ours, theirs in zip(torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_layer_adds_it_to_the_routed_experts():
    batch = make_batch([11, 5])
    with_it = Transformer(model_config({**TOP_K, "shared_expert": {"hidden_size": 40}}), VOCAB, Layout(), seed=0)
    plain = Transformer(model_config(TOP_K), VOCAB, Layout(), seed=0)
    layer, without = with_it.layers[1].ffn, plain.layers[1].ffn
    x = torch.randn(16, 32)
    y, _ = layer(x, batch.info)
    expected, _ = without(x, batch.info)
    torch.testing.assert_close(y, expected + layer.shared_expert(x, batch.info))
    assert layer.shared_expert(x, batch.info).abs().max() > 1e-3


LAYERS = {"0,2": {"ffn": {"type": "dense", "hidden_size": 56}}, "1": {"sliding_window": 3}}


def test_layers_may_differ():
    model = Transformer(model_config(TOP_K, layers=LAYERS), VOCAB, Layout(), seed=0)
    kinds = [type(block.ffn).__name__ for block in model.layers]
    assert kinds == ["SwiGLU", "MoELayer", "SwiGLU"] and model.expert_layers == [1]
    assert [block.attention.window for block in model.layers] == [0, 3, 0]
    output = model(make_batch([11, 5]).tokens_T, make_batch([11, 5]).info)
    assert [record.layer for record in output.records] == [1]


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ({"3": {}}, "there is no layer 3, num_layers=3"),
        ({"0-1": {}, "1": {}}, "layer 1 is given twice"),
        ({"first": {}}, "'first' is not a list of layer numbers"),
        ({"0-2": {"ffn": {"type": "dense", "hidden_size": 8}}}, "every layer is dense"),
        ({0: {"ffn": {"type": "moe"}}}, "layers"),
    ],
)
def test_bad_layers_are_one_sentence(layers, sentence):
    with pytest.raises(UserError, match=sentence):
        model_config(TOP_K, layers=layers)
