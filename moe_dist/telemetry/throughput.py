"""How much arithmetic a model does and how many parameters it has, by formula.

Conventions: a multiply-add is 2 FLOPs; matrix products alone count (not norms, activations, softmax, nor the routers'
small products, under 0.5 %, nor auxiliary routers, which a stage of their own trains); attention counts the pairs
(query, earlier or same key) of each document, L (L + 1) / 2 of them for length L, of the admitted tokens alone in a
layer with mixture-of-depths; the backward pass counts twice the forward, of the frozen weights beside LoRA once (they
have no gradient); what else a recipe freezes counts as if it were trained; recomputed activations do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from moe_dist.config import DenseFFN, LoRAExpertsConfig, ModelConfig


def model_flops(
    model: ModelConfig,
    *,
    vocab_size: int,
    document_lengths: Iterable[int],
    ffn_rows: Sequence[int] | None = None,
    admitted: Mapping[int, Iterable[int]] | None = None,
) -> int:
    """FLOPs of the forward and backward pass of one micro-batch.

    `document_lengths` cover all its tokens. `ffn_rows`: for each layer, the number of (token, expert) assignments of
    this micro-batch, whichever rank computes them; not given for a dense feed-forward part (all tokens of the layer).
    `admitted`: of the layers with mixture-of-depths, by number, how many tokens of each document they work on.
    """
    lengths = list(document_lengths)
    of_layers = [list((admitted or {}).get(layer, lengths)) for layer in range(model.num_layers)]
    tokens = sum(chain(*of_layers))
    pairs = sum(length * (length + 1) // 2 for length in chain(*of_layers))
    base, delta = _attention_weights(model), _attention_lora_weights(model)
    projections = ((2 if delta else 3) * base + 3 * delta) * tokens
    attention = 3 * 2 * model.num_heads * model.size_per_head * pairs
    shared, expert = _ffn_weights(model)
    ffn = (2 * shared + 3 * expert) * (tokens if ffn_rows is None else sum(ffn_rows))
    output = 3 * model.hidden_size * vocab_size * sum(lengths)
    return 2 * (projections + attention + ffn + output)


def flops_saved(
    model: ModelConfig,
    *,
    vocab_size: int,
    document_lengths: Iterable[int],
    tokens: int,
    experts: float,
    top_k: int,
    admitted: Mapping[int, Sequence[int]] | None = None,
) -> float:
    """AdaMoE's "FLOPs saved" (arXiv 2406.13233): the share that is saved where a token takes `experts` experts of every
    layer on average, against `top_k` of them. `tokens`: those that are routed, without padding; `admitted`: as in
    model_flops, where `experts` is a mean over all of `tokens`, also those that pass by a layer."""
    lengths, admitted = list(document_lengths), admitted or {}
    of_layers = [sum(admitted[layer]) if layer in admitted else tokens for layer in range(model.num_layers)]
    ours, theirs = (
        model_flops(model, vocab_size=vocab_size, document_lengths=lengths, ffn_rows=rows, admitted=admitted)
        for rows in ([round(experts * tokens)] * model.num_layers, [top_k * count for count in of_layers])
    )
    return 1 - ours / theirs


def num_parameters(model: ModelConfig, *, vocab_size: int, num_experts: int = 1, counted: float | None = None) -> float:
    """Parameters of a whole model, over all ranks. `num_experts`: experts of a layer (1 for a dense model).

    `counted`: how many experts of each layer to count; all by default. With the average number of experts a token gets,
    this is the number of active parameters of a token. Left out: biases and null experts of routers, and auxiliary
    routers.
    """
    width = model.hidden_size
    routing = 0 if isinstance(model.ffn, DenseFFN) else width * num_experts
    shared, expert = _ffn_weights(model)
    experts = shared + expert * (num_experts if counted is None else counted)
    attention = _attention_weights(model) + _attention_lora_weights(model)
    norms = 2 * width + (4 * model.size_per_head if model.qk_norm else 0)  # those of queries and keys have biases too
    vocabulary = width * vocab_size * (1 if model.tie_embeddings else 2)
    depth = width * len(model.depth_layers)
    return model.num_layers * (attention + norms + routing + experts) + depth + width + vocabulary


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
