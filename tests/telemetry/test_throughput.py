"""The FLOP and parameter formulas against the operations and parameters of the real modules."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from moe_dist.telemetry.throughput import flops_saved, model_flops, num_parameters
from tests.model.batches import (
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

LENGTHS = [16, 48, 64, 16, 48]  # multiples of 16: attention on CPU pads to them


def grouped_mm_flops(a, b, *_, out_shape=None, **__):
    """Rows by matrices [R, D] x [e, D, F], or a weight's gradient [D, R] x [R, F]."""
    return 2 * a[0] * a[1] * b[-1]


def causal_flops(query, *_, **__):
    """Two products over the pairs of a causal mask, where the counter itself would take the full square."""
    documents, heads, length, size = query
    return 4 * documents * heads * size * (length * (length + 1) // 2)


def causal_backward_flops(upstream, query, *_, **__):
    return 2 * causal_flops(query)


MAPPING = {
    torch.ops.aten._grouped_mm: grouped_mm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: causal_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: causal_backward_flops,
}


TIED_LLAMA = {**LLAMA, "head_size": 24, "tie_embeddings": True}
FFNS = {"dense": DENSE, "top_k": TOP_K, "moe_8x": EXPERT_CHOICE, "moma": MOMA, "lora": LORA_EXPERTS}


@pytest.mark.parametrize(
    "changes",
    [{}, TIED_LLAMA, {"attention_lora": LORA}, {**TIED_LLAMA, "attention_lora": LORA}],
    ids=["chameleon", "llama", "lora", "llama-lora"],
)
@pytest.mark.parametrize("ffn", FFNS.values(), ids=FFNS)
def test_model_flops_within_one_percent_of_the_counted_operations(ffn, changes):
    config = model_config(ffn, hidden_size=64, **changes)
    model, batch = Transformer(config, VOCAB, Layout(), seed=0), make_batch(LENGTHS)
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        output = model(batch.tokens_T, batch.info)
        output.logits_TV.sum().backward()
    rows = [int(record.load_E.sum()) for record in output.records] or None
    formula = model_flops(config, vocab_size=VOCAB, document_lengths=LENGTHS, ffn_rows=rows)
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("ffn", FFNS.values(), ids=FFNS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": False}, LLAMA, TIED_LLAMA, {**TIED_LLAMA, "attention_lora": LORA}],
    ids=["plain", "no-qk-norm", "llama", "tied", "lora"],
)
def test_parameter_formula_is_exact(ffn, changes):
    config = model_config(ffn, **changes)
    with torch.device("meta"):
        model = Transformer(config, VOCAB, Layout(), seed=0)
    experts = 1 if ffn is DENSE else model.layers[0].ffn.router.num_experts
    total = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters(config, vocab_size=VOCAB, num_experts=experts) == total
    active = num_parameters(config, vocab_size=VOCAB, num_experts=experts, counted=1)
    one = 3 * 8 * (32 + 48) if ffn is LORA_EXPERTS else 3 * 32 * 48
    assert total - active == config.num_layers * (experts - 1) * one


@pytest.mark.parametrize(
    ("experts", "percent"), [(1.66, 14.99), (1.68, 14.10), (1.59, 18.07), (1.63, 16.31), (1.70, 13.22), (1.67, 14.55)]
)
def test_flops_saved_are_those_of_adamoes_table(experts, percent):
    """Mixtral-8x7B at the loads that the paper reports (arXiv 2406.13233); short sequences, as its tasks have."""
    mixtral = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_query_groups": 8}
    router = {"type": "null_experts", "num_experts": 8, "num_null_experts": 8, "top_k": 3}
    config = model_config({"type": "moe", "hidden_size": 14336, "router": router}, **mixtral)
    sizes = {"vocab_size": 32_000, "document_lengths": [200], "tokens": 200}
    assert 100 * flops_saved(config, **sizes, experts=experts, top_k=2) == pytest.approx(percent, abs=0.2)
    assert flops_saved(config, **sizes, experts=2.0, top_k=2) == 0
