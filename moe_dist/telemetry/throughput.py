"""How much arithmetic a model does and how many parameters it has, by formula.

Conventions: a multiply-add is 2 FLOPs; matrix products alone count (not norms, activations, softmax, nor the routers'
small products, under 0.5 %); attention counts the pairs (query, earlier or same key) of each document, L (L + 1) / 2 of
them for length L; the backward pass counts twice the forward, of the frozen weights beside LoRA once (they have no
gradient); what else a recipe freezes counts as if it were trained; recomputed activations do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_dist.config import DenseFFN, LoRAExpertsConfig, ModelConfig


def model_flops(
    model: ModelConfig, *, vocab_size: int, document_lengths: Iterable[int], ffn_rows: Sequence[int] | None = None
) -> int:
    """FLOPs of the forward and backward pass of one micro-batch.

    `document_lengths` cover all its tokens. `ffn_rows`: for each layer, the number of (token, expert) assignments of
    this micro-batch, whichever rank computes them; not given for a dense model (all tokens).
    """
    lengths = list(document_lengths)
    tokens, width = sum(lengths), model.hidden_size
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    if ffn_rows is None:
        ffn_rows = [tokens] * model.num_layers
    base, delta = _attention_weights(model), _attention_lora_weights(model)
    projections = ((2 if delta else 3) * base + 3 * delta) * tokens * model.num_layers
    attention = 3 * 2 * model.num_heads * model.size_per_head * pairs * model.num_layers
    shared, expert = _ffn_weights(model)
    ffn = (2 * shared + 3 * expert) * sum(ffn_rows)
    output = 3 * width * vocab_size * tokens
    return 2 * (projections + attention + ffn + output)


def flops_saved(
    model: ModelConfig, *, vocab_size: int, document_lengths: Iterable[int], tokens: int, experts: float, top_k: int
) -> float:
    """AdaMoE's "FLOPs saved" (arXiv 2406.13233): the share that is saved where a token takes `experts` experts of every
    layer on average, against `top_k` of them. `tokens`: those that are routed, without padding."""
    lengths = list(document_lengths)
    ours, theirs = (
        model_flops(
            model, vocab_size=vocab_size, document_lengths=lengths, ffn_rows=[round(each * tokens)] * model.num_layers
        )
        for each in (experts, top_k)
    )
    return 1 - ours / theirs


def num_parameters(model: ModelConfig, *, vocab_size: int, num_experts: int = 1, counted: float | None = None) -> float:
    """Parameters of a whole model, over all ranks. `num_experts`: experts of a layer (1 for a dense model).

    `counted`: how many experts of each layer to count; all by default. With the average number of experts a token gets,
    this is the number of active parameters of a token. Biases and null experts of routers are left out.
    """
    width = model.hidden_size
    routing = 0 if isinstance(model.ffn, DenseFFN) else width * num_experts
    shared, expert = _ffn_weights(model)
    experts = shared + expert * (num_experts if counted is None else counted)
    attention = _attention_weights(model) + _attention_lora_weights(model)
    norms = 2 * width + (4 * model.size_per_head if model.qk_norm else 0)  # those of queries and keys have biases too
    vocabulary = width * vocab_size * (1 if model.tie_embeddings else 2)
    return model.num_layers * (attention + norms + routing + experts) + width + vocabulary


def _attention_weights(model: ModelConfig) -> int:
    """Of the projections of one layer: queries and outputs of all heads, keys and values of the query groups."""
    return 2 * (model.num_heads + model.query_groups) * model.size_per_head * model.hidden_size


def _attention_lora_weights(model: ModelConfig) -> int:
    """Of the deltas of one layer's projections: from and to the width for q, k, v and o each."""
    if model.attention_lora is None:
        return 0
    heads = 2 * (model.num_heads + model.query_groups) * model.size_per_head
    return model.attention_lora.rank * (4 * model.hidden_size + heads)


def _ffn_weights(model: ModelConfig) -> tuple[int, int]:
    """Of one layer's feed-forward part: the base that LoRA experts share, and one expert."""
    dense = 3 * model.hidden_size * model.ffn.hidden_size
    if isinstance(model.ffn, DenseFFN) or not isinstance(model.ffn.experts, LoRAExpertsConfig):
        return 0, dense
    return dense, 3 * model.ffn.experts.rank * (model.hidden_size + model.ffn.hidden_size)
