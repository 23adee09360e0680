"""The FLOP and parameter formulas against the operations and parameters of the real modules.

Operations are counted by PyTorch on the meta device. What it does not know: grouped products; and attention, which on
meta is batched products over the full square of a document, where a causal kernel needs the pairs of its lower half,
diagonal included: L (L + 1) / 2 of L^2. All other products of the model are unbatched.
"""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.config.recipe import load_config
from moe_dist.core.costs import LayerWork
from moe_dist.metrics.flops import flops_saved
from moe_dist.metrics.step_counts import StepCounts
from moe_dist.model import attention
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from moe_dist.training.trainable import freeze_others
from tests.support import ROOT
from tests.support.devices import inject, read_counts
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

LENGTHS = [120, 64, 250, 70]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def grouped_mm_flops(a, b, *_, **__):
    """Rows by matrices [R, D] x [e, D, F], or a weight's gradient [D, R] x [R, F]."""
    return 2 * a[0] * a[1] * b[-1]


def causal_flops(a, b, *_, **__):
    """A product of attention, forward or backward, of which half of the square [L, L] counts; the square is one of the
    factors or the result, and the third size that of a head."""
    documents, *sizes = (*a, b[-1])
    length = max(sizes, key=sizes.count)
    assert sizes.count(length) >= 2
    return documents * math.prod(sizes) // length * (length + 1)


@pytest.fixture(autouse=True)
def documents_without_padding(monkeypatch):
    """Attention outside CUDA pads documents to multiples of 16; the formula counts none of it."""
    monkeypatch.setattr(attention, "_MULTIPLE", 1)


MAPPING = {torch.ops.aten._grouped_mm: grouped_mm_flops, torch.ops.aten.bmm: causal_flops}


def counted_and_formula(config, trainable=("*",), *, twin=None, lengths=LENGTHS):
    """FLOPs of a training step, as counted and by formula. What the routers of the model on meta decide is read off a
    twin on the CPU, by default the same model with values."""
    batch = make_batch(lengths)
    real = Transformer(twin or config, VOCAB, Layout(), seed=0)
    outputs = []
    real.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        counts = read_counts(real, batch.tokens_T, batch.info)
    model = on_meta(config)
    freeze_others(model, trainable)
    inject(model, counts)
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        step(model, batch.to("meta"))
    return counter.get_total_flops(), StepCounts.of(batch, outputs[0], Layout()).flops(model)


def on_meta(config, vocab_size=VOCAB):
    with torch.device("meta"):
        return Transformer(config, vocab_size, Layout(), seed=0)


def step(model, batch):
    """Forward, and backward from the logits and from the auxiliary routers, as their loss does."""
    output = model(batch.tokens_T, batch.info)
    parts = [part for record in output.records for part in record.routings]
    auxiliary = [part.auxiliary_VC for part in (*parts, *(depth.routing for depth in output.depths))]
    (output.logits_TV.sum() + sum(logits.sum() for logits in auxiliary if logits is not None)).backward()


def moma(text, image, **more):
    children = {"text": text, "image": image}
    router = {name: {"type": "expert_choice", "num_experts": number, **more} for name, number in children.items()}
    return {"type": "moe", "hidden_size": 48, "router": {"type": "modality", **router}}


NULL_ROUTER = {"type": "null_experts", "num_experts": 8, "num_null_experts": 8, "top_k": 3}
TIED_LLAMA = {**LLAMA, "head_size": 24, "tie_embeddings": True}
FFNS = {"dense": DENSE, "top_k": TOP_K, "moe_8x": EXPERT_CHOICE, "moma": MOMA, "lora": LORA_EXPERTS}
SHARED = TOP_K | {"shared_expert": {"hidden_size": 40, "gate": True}}
MORE_FFNS = {
    **FFNS,
    "moma_1t1i": moma(1, 1),
    "moma_6t2i": moma(6, 2),
    "moma_7t1i_in_slices": {**moma(7, 1), "slices": 2},
    "auxiliary": moma(4, 4, auxiliary=True),
    "null": {"type": "moe", "hidden_size": 48, "router": NULL_ROUTER},
}
SHARED = {**TOP_K, "shared_expert": {"hidden_size": 40}}
GATED = {**TOP_K, "shared_expert": {"hidden_size": 40, "gate": True}}
PRETRAINED = {
    **TIED_LLAMA,
    "qk_norm": "rms_norm_full",
    "attention_bias": "all",
    "clip_qkv": 1.0,
    "layers": {"0,2": {"ffn": {"type": "dense", "hidden_size": 56, "bias": True}}},
}
CHANGES = {
    "chameleon": {},
    "llama": TIED_LLAMA,
    "lora": {"lora": LORA},
    "llama-lora": {**TIED_LLAMA, "lora": LORA},
    "depth": {"depth": {}},
    "depth_of_sequences": {"depth": {"scope": "sequence"}},
    "depth_of_modalities": {"depth": {"scope": "modality", "auxiliary": True}},
}


@pytest.mark.parametrize(
    "changes",
    [pytest.param(CHANGES[name], id=name, marks=() if name == "chameleon" else pytest.mark.slow) for name in CHANGES],
)
@pytest.mark.parametrize("ffn", MORE_FFNS.values(), ids=MORE_FFNS)
def test_model_flops_are_the_counted_operations(ffn, changes):
    """To the last one: gates and auxiliary routers are less than a hundredth."""
    counted, formula = counted_and_formula(model_config(ffn, hidden_size=64, **changes))
    assert formula == counted


@pytest.mark.parametrize("ffn", [SHARED, GATED], ids=["shared", "gated"])
@pytest.mark.parametrize("changes", [{}, PRETRAINED], ids=["chameleon", "pretrained"])
def test_shared_experts_and_layers_that_differ(ffn, changes):
    config = model_config(ffn, hidden_size=64, **changes)
    counted, formula = counted_and_formula(config)
    assert formula == counted
    model = on_meta(config)
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("window", [0, 1, 3, 7, 8, 100])
def test_a_window_counts_the_pairs_that_it_lets_see(window):
    work = LayerWork(document_lengths=(7, 1, 20), rows=0)
    seen = (min(position + 1, window or position + 1) for length in (7, 1, 20) for position in range(length))
    assert work.pairs(window) == sum(seen)


STAGES = {
    "causal_routers": (moma(4, 4, auxiliary=True), {"depth": {"auxiliary": True}}, ("*.auxiliary.*",)),
    "routers_of_the_last_layer": (TOP_K, {}, ("layers.2.ffn.router.*",)),
    "routers_beside_lora": (LORA_EXPERTS, {}, ("layers.1.ffn.router.*",)),
    "lora": (LORA_EXPERTS, {"lora": LORA}, ("*.router.*", "*.lora.*")),
    "lora_of_experts": (LORA_EXPERTS, {}, ("*.router.*", "*.lora.*")),
    "experts": (MOMA, {}, ("*.experts.*",)),
    "lora_of_pretrained_experts": (SHARED, {"lora": LORA | {"targets": ["experts.*"]}}, ("*.lora.*",)),
    "lora_everywhere": (SHARED, {"lora": LORA | {"targets": ["*"]}}, ("*.lora.*",)),
    "lora_of_some_parts": (SHARED, {"lora": LORA | {"targets": ["*.up", "attention.v", "router"]}}, ("*.lora.*",)),
    "lora_of_dense_parts": (DENSE, {"lora": LORA | {"targets": ["ffn.*"]}}, ("*.lora.*",)),
    "norms": (DENSE, {}, ("layers.1.attention_norm.weight",)),
    "last_norm": (DENSE, {}, ("norm.weight",)),
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_nor_do_they_differ_more_where_a_stage_freezes_the_rest(stage):
    ffn, changes, trainable = stage
    config = model_config(ffn, hidden_size=64, **changes)
    counted, formula = counted_and_formula(config, trainable)
    assert formula == pytest.approx(counted, rel=0.01)
    assert counted_and_formula(config)[1] > 1.02 * counted, "training all of it costs no more"


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_nor_in_any_recipe(path):
    recipe = load_config(path)
    config = recipe.model.model_copy(update={"recompute": False})
    narrow = {"hidden_size": 8 * config.num_heads, "head_size": 8}
    narrow["ffn"] = config.ffn.model_copy(update={"hidden_size": 16})
    twin = config.model_copy(update=narrow)
    counted, formula = counted_and_formula(config, recipe.trainable, twin=twin, lengths=[256, 256])
    assert formula == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"depth": {}}], ids=["plain", "depth"])
def test_recomputed_activations_are_a_second_forward_pass_that_does_not_count(changes):
    plain, recomputed = (
        counted_and_formula(model_config(MOMA, hidden_size=64, recompute=recompute, **changes))
        for recompute in (False, True)
    )
    assert recomputed[1] == plain[1]
    # Of what is trained as a whole a third is the forward pass; the output product is not computed again.
    output = 3 * 2 * 64 * VOCAB * sum(LENGTHS)
    assert recomputed[0] - plain[0] == pytest.approx((plain[0] - output) / 3, rel=0.01)


@pytest.mark.parametrize("ffn", MORE_FFNS.values(), ids=MORE_FFNS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "none"},
        {"qk_norm": "rms_norm", "attention_bias": "qkv"},
        LLAMA,
        TIED_LLAMA,
        {**TIED_LLAMA, "lora": LORA},
        {"depth": {"auxiliary": True}},
    ],
    ids=["plain", "no-qk-norm", "rms-and-biases", "llama", "tied", "lora", "depth"],
)
def test_parameter_formula_is_exact(ffn, changes):
    config = model_config(ffn, **changes)
    model = on_meta(config)
    experts = 1 if ffn is DENSE else model.layers[0].ffn.router.num_experts
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == total
    one = 3 * 8 * (32 + 48) if ffn is LORA_EXPERTS else 3 * 32 * 48
    for active in (1, 1.5) if experts > 1 else ():
        assert total - model.num_parameters(experts=active) == config.num_layers * (experts - active) * one


@pytest.mark.parametrize("targets", [["*"], ["experts.down", "ffn.up"], ["shared_expert.*", "router", "attention.k"]])
def test_parameter_formula_is_exact_with_lora(targets):
    dense = {"layers": {"0": {"ffn": {"type": "dense", "hidden_size": 40, "bias": True}}}}
    config = model_config(SHARED, **dense, **LLAMA, attention_bias="qkv", lora=LORA | {"targets": targets})
    model = on_meta(config)
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    experts = [p for name, p in model.layers[1].named_parameters() if ".experts." in name]
    one = sum(parameter[0].numel() for parameter in experts)
    assert model.num_parameters() - model.num_parameters(experts=1.5) == 2 * 2.5 * one


def test_parameters_are_those_of_all_ranks():
    """A rank that holds half of the experts, and one in slices."""
    for ffn in (TOP_K, MORE_FFNS["moma_7t1i_in_slices"]):
        config = model_config(ffn)
        with torch.device("meta"):
            of_a_rank = Transformer(config, VOCAB, Layout(rank=1, world=2, expert=2, ep_group=object()), seed=0)
        assert sum(parameter.numel() for parameter in of_a_rank.parameters()) < of_a_rank.num_parameters()
        assert of_a_rank.num_parameters() == on_meta(config).num_parameters()


@pytest.mark.parametrize(
    ("experts", "percent"), [(1.66, 14.99), (1.68, 14.10), (1.59, 18.07), (1.63, 16.31), (1.70, 13.22), (1.67, 14.55)]
)
def test_flops_saved_are_those_of_adamoes_table(experts, percent):
    """Mixtral-8x7B at the loads that the paper reports (arXiv 2406.13233); short sequences, as its tasks have."""
    mixtral = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_query_groups": 8}
    router = {"type": "null_experts", "num_experts": 8, "num_null_experts": 8, "top_k": 3}
    config = model_config({"type": "moe", "hidden_size": 14336, "router": router}, **mixtral)
    model, sizes = on_meta(config, vocab_size=32_000), {"document_lengths": [200], "tokens": 200}
    assert 100 * flops_saved(model, **sizes, experts=experts, top_k=2) == pytest.approx(percent, abs=0.2)
    assert flops_saved(model, **sizes, experts=2.0, top_k=2) == 0
