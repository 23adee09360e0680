"""Descriptions of the arithmetic that a model performs. The modules in model/ create them, and metrics/flops.py
computes FLOPs from them.

Only matrix products are counted, in multiply-adds. Norms, activations, softmax, recomputed activations and the padding
rows that the router setting `pad_to_capacity` adds are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Product(NamedTuple):
    """Matrix products in a forward pass: their total multiply-adds, and which of their operands are weights."""

    multiply_adds: int
    weights: tuple[Tensor, ...] | None  # the parameters among the factors; None: both factors are activations
    beside_lora: bool = False  # True for weights that the module itself keeps frozen, next to LoRA deltas


def linear_product(linear: nn.Linear, rows: int, *, beside_lora: bool = False) -> Product:
    """Return the Product that describes a linear layer applied to `rows` rows.

    If the layer has a bias, the Product's weights include the bias.
    beside_lora: True if the layer's weight stays frozen and only the LoRA deltas next to it are trained.
    """
    return Product(num_weights(linear) * rows, tuple(linear.parameters(recurse=False)), beside_lora)


def num_weights(linear: nn.Linear) -> int:
    """Return the number of weights of a linear layer. The result is correct even if ZeRO has partitioned them."""
    return linear.in_features * linear.out_features


def no_products(*modules: nn.Module) -> Product:
    """Return a Product with zero multiply-adds for modules without matrix products, such as norms.

    The modules' parameters are the Product's weights. If they are trained, backpropagation must reach them, so all
    later products of the chain must also compute the gradients of their inputs.
    """
    return Product(0, tuple(parameter for module in modules for parameter in module.parameters()))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWork:
    """The numbers that determine how many multiply-adds one layer performs for a micro-batch."""

    document_lengths: Sequence[int]  # of the tokens that the layer processes
    rows: int  # (token, expert) assignments of the tokens, on any rank; the number of tokens if the FFN is dense
    scored: Sequence[int] = ()  # tokens scored by each part of the expert layer's router; (): do not count the router
    depth_scored: Sequence[int] = ()  # the same for the layer's mixture-of-depths router

    @property
    def tokens(self) -> int:
        return sum(self.document_lengths)

    def pairs(self, window: int = 0) -> int:
        """Return the number of (query, key) pairs within documents. window: see Documents.attend in model/attention.py.

        Without a window, a document of length L has L (L + 1) / 2 pairs.
        """
        spans = [(length, min(length, window or length)) for length in self.document_lengths]
        return sum(span * (span + 1) // 2 + (length - span) * span for length, span in spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The numbers that determine how many multiply-adds a model performs for a micro-batch.

    Mappings are keyed by layer number.
    """

    document_lengths: Sequence[int]  # of all tokens of the micro-batch
    rows: Mapping[int, int] = field(default_factory=dict)  # LayerWork.rows of each layer with experts
    admitted: Mapping[int, Sequence[int]] = field(default_factory=dict)  # tokens of each document that a layer with
    # mixture-of-depths processes
    scored: Mapping[int, Sequence[int]] = field(default_factory=dict)
    depth_scored: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(self.document_lengths)

    def of_layer(self, layer: int) -> LayerWork:
        lengths = self.admitted.get(layer, self.document_lengths)
        return LayerWork(
            document_lengths=lengths,
            rows=self.rows.get(layer, sum(lengths)),
            scored=self.scored.get(layer, ()),
            depth_scored=self.depth_scored.get(layer, ()),
        )


class Costed(Protocol):
    """Interface for models that report the matrix products they compute."""

    @property
    def expert_layers(self) -> Sequence[int]: ...

    def products(self, work: Work) -> Iterable[Iterable[Product]]:
        """Return the matrix products of a forward pass, divided into chains.

        A chain lists its products in the order of computation. No gradient is computed for the input of a chain's first
        product.
        """
        ...
