"""The FLOPs of training, computed from the matrix products that each module of a model reports (core/costs.py).

A multiply-add is 2 FLOPs. A product counts once for the forward pass, once more for the gradient of its weights if they
are trained, and once more for the gradient of its input if an earlier product has trained weights. Therefore the FLOPs
of a model that is trained as a whole are three times those of the forward pass. In LoRA training, a product with frozen
weights counts twice if an earlier product has trained weights, otherwise once. An auxiliary router detaches its input,
so no gradient flows back from it to earlier products. Its own products are therefore counted as if they came first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from moe_dist.core.costs import Costed, Product, Work


def model_flops(model: Costed, work: Work) -> int:
    """Return the FLOPs of the forward and backward passes of one micro-batch.

    The gradients of frozen parameters are not counted.
    """
    return _flops(model, work, _is_trained)


def flops_saved(
    model: Costed,
    *,
    document_lengths: Sequence[int],
    tokens: int,
    experts: float,
    top_k: int,
    admitted: Mapping[int, Sequence[int]] | None = None,
) -> float:
    """Return AdaMoE's "FLOPs saved" (arXiv 2406.13233): 1 - (FLOPs of this model) / (FLOPs with top_k experts).

    In this model, a token is processed by `experts` experts per layer on average. In the reference model, every token
    is processed by `top_k` experts in every layer.

    Neither FLOP count includes the routers. Both assume that all parameters are trained, except those that LoRA
    freezes. Therefore the result does not depend on the recipe's `trainable`.

    tokens: the number of routed tokens, without padding.
    experts: the mean number of experts per token and layer. A token that skips a layer with mixture-of-depths counts
    as 0 in that layer.
    admitted: see Work.admitted in core/costs.py.
    """
    admitted = admitted or {}
    of_layers = {layer: sum(admitted[layer]) if layer in admitted else tokens for layer in model.expert_layers}
    ours, theirs = (
        _flops(model, Work(document_lengths=document_lengths, rows=rows, admitted=admitted), _can_be_trained)
        for rows in (
            dict.fromkeys(of_layers, round(experts * tokens)),
            {layer: top_k * count for layer, count in of_layers.items()},
        )
    )
    return 1 - ours / theirs


def _flops(model: Costed, work: Work, trained: Callable[[Product], bool]) -> int:
    return 2 * sum(_with_backward(chain, trained) for chain in model.products(work))


def _with_backward(chain: Iterable[Product], trained: Callable[[Product], bool]) -> int:
    """Return the number of multiply-adds that a chain of matrix products needs in the forward and backward passes.

    Gradients that training does not need are not counted. trained: a function that returns True if a product's weights
    are trained.
    """
    total, before = 0, False  # before: an earlier product of the chain is trained
    for product in chain:
        own = before if product.weights is None else trained(product)
        total += product.multiply_adds * (1 + before + own)
        before |= own
    return total


def _is_trained(product: Product) -> bool:
    return any(weight.requires_grad for weight in product.weights or ())


def _can_be_trained(product: Product) -> bool:
    return bool(product.weights) and not product.beside_lora
