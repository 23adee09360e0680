"""FLOPs of training, from the matrix products that the modules of a model state (core/costs.py).

A multiply-add is 2 FLOPs. Forward, each product counts once; backward, once for the gradient of its weights if they are
trained, and once for the gradient of what they multiply if anything trained lies before it. So a model that is trained
as a whole counts three times its forward pass, frozen weights beside LoRA twice, and what lies before the first trained
weight once. An auxiliary router's input is detached: it is a chain of its own, and counts as trained where its weights
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from moe_dist.core.costs import Costed, Product, Work


def model_flops(model: Costed, work: Work) -> int:
    """Return the FLOPs of the forward and backward pass of one micro-batch, as the model is trained."""
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
    """Return AdaMoE's "FLOPs saved" (arXiv 2406.13233): the fraction that is saved where a token takes `experts`
    experts of every layer on average, against `top_k` of them.

    Routers are left out of both, and a stage that freezes parameters changes neither. tokens: those that are routed,
    without padding. admitted: as in Work; `experts` is a mean over all of `tokens`, also those that pass by a layer.
    """
    admitted = admitted or {}
    of_layers = [sum(admitted[layer]) if layer in admitted else tokens for layer in range(model.num_layers)]
    ours, theirs = (
        _flops(model, Work(document_lengths=document_lengths, rows=rows, admitted=admitted), _can_be_trained)
        for rows in ([round(experts * tokens)] * model.num_layers, [top_k * count for count in of_layers])
    )
    return 1 - ours / theirs


def _flops(model: Costed, work: Work, trained: Callable[[Product], bool]) -> int:
    return 2 * sum(_with_backward(chain, trained) for chain in model.products(work))


def _with_backward(chain: Iterable[Product], trained: Callable[[Product], bool]) -> int:
    """Return the multiply-adds of products that follow one another: forward, and the gradients that training needs."""
    total, before = 0, False  # before: something trained lies before the product
    for product in chain:
        own = before if product.weights is None else trained(product)
        total += product.multiply_adds * (1 + before + own)
        before |= own
    return total


def _is_trained(product: Product) -> bool:
    return any(weight.requires_grad for weight in product.weights or ())


def _can_be_trained(product: Product) -> bool:
    return bool(product.weights) and not product.beside_lora
