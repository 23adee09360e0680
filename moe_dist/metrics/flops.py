"""How much arithmetic a model does and how many parameters it has, by formula.

Conventions: a multiply-add is 2 FLOPs; matrix products alone count (not norms, activations nor softmax); attention
counts the pairs (query, earlier or same key) of each document, L (L + 1) / 2 of them for length L, of the admitted
tokens alone in a layer with mixture-of-depths. Forward, each product counts once; backward, once for the gradient of
its weights if they are trained, and once for the gradient of what they multiply if anything trained lies before it. So
a model that is trained as a whole counts three times its forward pass, frozen weights beside LoRA twice, and what lies
before the first trained weight once. An auxiliary router's input is detached: it is a chain of its own, and counts as
trained where its weights are. Recomputed activations and the empty rows of pad_to_capacity do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

import torch

from moe_dist.config.recipe import DenseFFN, LoRAExpertsConfig, ModelConfig
from moe_dist.core.routing_plan import DepthRecord, Routing, RoutingRecord


class Product(NamedTuple):
    """Products of one kind in a forward pass."""

    multiply_adds: float
    weights: str | None  # pattern of the weights' names; None: both factors are activations
    beside_lora: bool = False  # such weights are frozen


def model_flops(
    model: ModelConfig,
    *,
    vocab_size: int,
    document_lengths: Iterable[int],
    ffn_rows: Sequence[int] | None = None,
    admitted: Mapping[int, Iterable[int]] | None = None,
    routings: Mapping[str, Sequence[Routing]] | None = None,
    trained: frozenset[str] | None = None,
) -> int:
    """FLOPs of the forward and backward pass of one micro-batch.

    `document_lengths` cover all its tokens. `ffn_rows`: for each layer, the number of (token, expert) assignments of
    this micro-batch, whichever rank computes them; not given for a dense feed-forward part (all tokens of the layer).
    `admitted`: of the layers with mixture-of-depths, by number, how many tokens of each document they work on.
    `routings`: what each router scored, by the prefix of its weights' names; routers that are not there do not count.
    `trained`: names of the trained parameters; by default all, but for the weights beside LoRA.
    """
    lengths, admitted, routings = list(document_lengths), admitted or {}, routings or {}
    chain = [Product(0, "embedding.*")]
    for layer in range(model.num_layers):
        of_layer = list(admitted.get(layer, lengths))
        rows = sum(of_layer) if ffn_rows is None else ffn_rows[layer]
        gates, depth = (
            [_gate(model, prefix, part) for part in routings.get(prefix, ())]
            for prefix in (f"layers.{layer}.ffn.router", f"depth.{layer}.router")
        )
        pairs = sum(length * (length + 1) // 2 for length in of_layer)
        chain += _attention(model, f"layers.{layer}.attention.core.", tokens=sum(of_layer), pairs=pairs)
        chain.append(Product(0, f"layers.{layer}.attention_norm.*"))
        chain += _ffn(model, f"layers.{layer}.ffn.", rows=rows, shared=rows, gates=gates)
        chain += [Product(0, f"layers.{layer}.ffn_norm.*"), *depth]
    output = "embedding.*" if model.tie_embeddings else "output.*"
    chain.append(Product(model.hidden_size * vocab_size * sum(lengths), output))
    auxiliary = [_auxiliary(model, prefix, part) for prefix, parts in routings.items() for part in parts]
    return int(2 * sum(_with_backward(products, trained) for products in (chain, *auxiliary)))


def work(records: Sequence[RoutingRecord], depths: Sequence[DepthRecord]) -> dict[str, Any]:
    """Keyword arguments for model_flops, from a micro-batch's records. Reads the device once for all layers."""
    routings = {f"layers.{record.layer}.ffn.router": record.routings for record in records}
    rows = [part.kept_VE.sum() for record in records for part in record.routings]
    of_parts = iter(torch.stack(rows).tolist() if rows else [])
    return {
        "ffn_rows": [sum(next(of_parts) for _ in record.routings) for record in records] or None,
        "admitted": {depth.layer: depth.document_lengths for depth in depths},
        "routings": routings | {f"depth.{depth.layer}.router": (depth.routing,) for depth in depths},
    }


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
    layer on average, against `top_k` of them; routers are left out of both. `tokens`: those that are routed, without
    padding; `admitted`: as in model_flops, where `experts` is a mean over all of `tokens`, also those that pass by a
    layer."""
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
    experts = num_experts if counted is None else counted
    matrices = [*_attention(model, "", tokens=1, pairs=0), *_ffn(model, "", rows=experts, shared=1)]
    norms = 2 * width + (4 * model.size_per_head if model.qk_norm else 0)  # those of queries and keys have biases too
    vocabulary = width * vocab_size * (1 if model.tie_embeddings else 2)
    depth = width * len(model.depth_layers)
    of_layer = norms + routing + sum(product.multiply_adds for product in matrices)
    return model.num_layers * of_layer + depth + width + vocabulary


def _attention(model: ModelConfig, at: str, *, tokens: int, pairs: int) -> Iterator[Product]:
    """Of one layer: queries and outputs of all heads, keys and values of the query groups, LoRA's deltas of each."""
    width, heads = model.hidden_size, model.num_heads * model.size_per_head
    keys = 2 * model.query_groups * model.size_per_head
    for name, inputs, outputs, deltas in (("linear_qkv", width, heads + keys, 3), ("linear_proj", heads, width, 1)):
        yield Product(inputs * outputs * tokens, f"{at}{name}.weight", beside_lora=model.attention_lora is not None)
        if model.attention_lora is not None:
            yield Product(model.attention_lora.rank * (deltas * inputs + outputs) * tokens, f"{at}{name}.lora.*")
        if name == "linear_qkv":
            yield Product(0, f"{at}*norm.*")
            yield Product(2 * heads * pairs, None)


def _ffn(model: ModelConfig, at: str, *, rows: float, shared: int, gates: Sequence[Product] = ()) -> list[Product]:
    """Of one layer: `rows` go through an expert, `shared` through the base of LoRA experts. The gates stand behind what
    their gradient does not need: combine weights scale the deltas of LoRA, and the output of other experts."""
    one, ffn = model.hidden_size * model.ffn.hidden_size, model.ffn
    if isinstance(ffn, DenseFFN) or not isinstance(ffn.experts, LoRAExpertsConfig):
        experts = at if isinstance(ffn, DenseFFN) else f"{at}experts."
        return [Product(2 * one * rows, f"{experts}gate_up*"), Product(one * rows, f"{experts}down*"), *gates]
    deltas = 3 * ffn.experts.rank * (model.hidden_size + ffn.hidden_size)
    return [
        Product(2 * one * shared, f"{at}experts.base.gate_up.*", beside_lora=True),
        *gates,
        Product(deltas * rows, f"{at}experts.lora.*"),
        Product(one * shared, f"{at}experts.base.down.*", beside_lora=True),
    ]


def _gate(model: ModelConfig, prefix: str, part: Routing) -> Product:
    return Product(model.hidden_size * part.logits_VC.numel(), f"{prefix}.*gate.*")


def _auxiliary(model: ModelConfig, prefix: str, part: Routing) -> list[Product]:
    """W1 of D x D/2 and W2 of D/2 x C, where there is such a router."""
    if part.auxiliary_VC is None:
        return []
    hidden, name = model.hidden_size // 2, f"{prefix}.*auxiliary"
    first = Product(model.hidden_size * hidden * len(part.auxiliary_VC), f"{name}.w1")
    return [first, Product(hidden * part.auxiliary_VC.numel(), f"{name}.w2")]


def _with_backward(chain: Iterable[Product], trained: frozenset[str] | None) -> float:
    """Multiply-adds of products that follow one another: forward, and the gradients that training needs."""
    total: float = 0
    before = False  # before: something trained lies before the product
    for product in chain:
        if product.weights is None:
            own = before
        else:
            own = not product.beside_lora if trained is None else _any_matches(product.weights, trained)
        total += product.multiply_adds * (1 + before + own)
        before |= own
    return total


@cache
def _any_matches(pattern: str, names: frozenset[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)
