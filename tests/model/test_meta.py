"""A model that is built on the meta device, and then given memory, is the model that is built on a real device."""

import pytest
import torch
from torch import nn

from moe_dist.core.expert_rows import expert_ids
from moe_dist.core.initial_values import all_new, constant_, give_memory, none_new, on_meta, set_initial
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.model.test_causal import with_auxiliary
from tests.support.model_batches import DENSE, EXPERT_CHOICE, MOMA, TOP_K, VOCAB, model_config

CPU = torch.device("cpu")
ROUTER = {"num_experts": 4, "top_k": 2}
LORA = {"type": "lora", "rank": 2, "alpha": 4.0}
MODELS = {
    "dense, tied, biases": {
        "ffn": DENSE | {"bias": True},
        "tie_embeddings": True,
        "attention_bias": "all",
        "qk_norm": "rms_norm_full",
    },
    "top-k, router bias, shared expert": {
        "ffn": TOP_K
        | {"router": {"type": "top_k", **ROUTER, "bias": True}, "shared_expert": {"hidden_size": 8, "gate": True}}
    },
    "auxiliary routers and depth": {"ffn": with_auxiliary(MOMA), "depth": {"every": 1, "auxiliary": True}},
    "expert choice": {"ffn": EXPERT_CHOICE, "norm": "pre"},
    "lora experts": {
        "ffn": TOP_K | {"experts": LORA, "router": {"type": "top_k", "num_experts": 4, "top_k": 1}},
        "lora": {"rank": 2, "alpha": 4.0},
    },
    "lora everywhere": {
        "ffn": TOP_K | {"shared_expert": {"hidden_size": 8}},
        "layers": {"0": {"ffn": DENSE | {"bias": True}}},
        "lora": {"rank": 2, "alpha": 4.0, "targets": ["*"]},
    },
    "router with state": {"ffn": TOP_K | {"router": {"type": "deepseek_v3", **ROUTER}}},
}


def build(settings, *, meta, seed=3):
    layout = Layout(rank=1, world=2, expert=2, ep_group=object())
    with torch.device("meta" if meta else "cpu"):
        return Transformer(model_config(**settings), VOCAB, layout, seed)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tensors(settings, dtype):
    real, model = build(settings, meta=False), build(settings, meta=True)
    before = dict(model.named_parameters())
    assert on_meta(model) and not on_meta(real)
    give_memory(model, CPU, dtype, is_new=all_new)
    assert not on_meta(model)
    found, expected = model.state_dict(keep_vars=True), real.state_dict(keep_vars=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        is_buffer = not isinstance(tensor, nn.Parameter)
        assert torch.equal(found[name], tensor if is_buffer else tensor.to(dtype)), name
        assert (found[name].requires_grad, expert_ids(found[name])) == (tensor.requires_grad, expert_ids(tensor))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert (model.output.weight is model.embedding.weight) == (settings.get("tie_embeddings", False))


def test_what_will_be_loaded_is_zero_and_each_parameter_is_sharded_before_the_next():
    model, real = build(MODELS["expert choice"], meta=True), build(MODELS["expert choice"], meta=False)
    largest = max(parameter.numel() for parameter in model.parameters())
    kept, storages = {}, set()

    def shard(parameter):
        storages.add(parameter.untyped_storage().data_ptr())
        assert parameter.untyped_storage().nbytes() == largest * 4
        kept[id(parameter)] = parameter.detach().clone()
        parameter.data = torch.empty(0)

    give_memory(model, CPU, torch.float32, is_new=lambda name: "router" in name, shard=shard)
    assert len(storages) == 1
    for (name, parameter), expected in zip(model.named_parameters(), real.parameters(), strict=True):
        assert torch.equal(kept[id(parameter)], expected if "router" in name else torch.zeros_like(expected)), name


def test_a_tensor_without_initial_values_is_named():
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(2, 3), nn.RMSNorm(3))
        set_initial(layer[0].weight, lambda tensor: tensor.copy_(torch.arange(6).view(3, 2)))
    for is_new in (all_new, none_new):
        with pytest.raises(RuntimeError, match=r"'0\.bias' has no initial values: its module must call set_initial"):
            give_memory(layer, CPU, torch.float32, is_new=is_new)
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(2, 3), nn.RMSNorm(3))
        set_initial(layer[0].weight, lambda tensor: tensor.copy_(torch.arange(6).view(3, 2)))
        constant_(layer[0].bias, 7.0)
    give_memory(layer, CPU, torch.float32, is_new=all_new)
    assert layer[0].weight.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert layer[0].bias.tolist() == [7, 7, 7] and layer[1].weight.tolist() == [1, 1, 1]
