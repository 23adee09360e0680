"""How much arithmetic a model does and how many parameters it has, by formula.

Conventions: a multiply-add is 2 FLOPs; matrix products alone count (not norms, activations, softmax, nor the routers'
small products, under 0.5 %); attention counts the pairs (query, earlier or same key) of each document, L (L + 1) / 2 of
them for length L; the backward pass counts twice the forward; recomputed activations do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_dist.config import DenseFFN, ModelConfig


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
    projections = 4 * width * width * tokens * model.num_layers
    attention = 2 * width * pairs * model.num_layers
    ffn = 3 * width * model.ffn.hidden_size * sum(ffn_rows)
    output = width * vocab_size * tokens
    return 3 * 2 * (projections + attention + ffn + output)


def num_parameters(model: ModelConfig, *, vocab_size: int, num_experts: int = 1, counted: float | None = None) -> float:
    """Parameters of a whole model, over all ranks. `num_experts`: experts of a layer (1 for a dense model).

    `counted`: how many experts of each layer to count; all by default. With the average number of experts a token gets,
    this is the number of active parameters of a token.
    """
    width, head_size = model.hidden_size, model.hidden_size // model.num_heads
    routing = 0 if isinstance(model.ffn, DenseFFN) else width * num_experts
    experts = 3 * width * model.ffn.hidden_size * (num_experts if counted is None else counted)
    norms = 2 * width + (4 * head_size if model.qk_norm else 0)  # queries' and keys' norms have weights and biases
    return model.num_layers * (4 * width * width + norms + routing + experts) + width + 2 * width * vocab_size
