"""The arithmetic that modules say they do: values between model/ and metrics/flops.py.

Conventions: matrix products alone count (not norms, activations nor softmax), in multiply-adds. Recomputed activations
and the empty rows of pad_to_capacity do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Product(NamedTuple):
    """Matrix products of one kind in a forward pass."""

    multiply_adds: int
    weights: tuple[Tensor, ...] | None  # the parameters that are a factor; None: both factors are activations
    beside_lora: bool = False  # the module itself keeps these weights frozen


def linear_product(linear: nn.Linear, rows: int, *, beside_lora: bool = False) -> Product:
    """Return the product of a linear layer and this number of rows."""
    return Product(num_weights(linear) * rows, (linear.weight,), beside_lora)


def num_weights(linear: nn.Linear) -> int:
    """Return the number of weights of a linear layer, also where ZeRO has partitioned them."""
    return linear.in_features * linear.out_features


def no_products(*modules: nn.Module) -> Product:
    """Return the entry of modules without products (norms): if they are trained, gradients reach up to them."""
    return Product(0, tuple(parameter for module in modules for parameter in module.parameters()))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWork:
    """The work that a micro-batch gives one layer."""

    tokens: int  # that the layer works on
    pairs: int  # (query, earlier or same key) within a document: L (L + 1) / 2 for a length L
    rows: int  # (token, expert) assignments, whichever rank computes them; of a dense feed-forward part, the tokens
    scored: Sequence[int] = ()  # tokens that each part of the expert layer's router scored; (): it does not count
    depth_scored: Sequence[int] = ()  # likewise, of the router of the layer's mixture-of-depths


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work that a micro-batch gives a model. Mappings are by layer number."""

    document_lengths: Sequence[int]  # of all its tokens
    rows: Sequence[int] | None = None  # LayerWork.rows of each layer; None: a dense model
    admitted: Mapping[int, Sequence[int]] = field(default_factory=dict)  # tokens of each document that a layer with
    # mixture-of-depths works on
    scored: Mapping[int, Sequence[int]] = field(default_factory=dict)
    depth_scored: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(self.document_lengths)

    def of_layer(self, layer: int) -> LayerWork:
        lengths = self.admitted.get(layer, self.document_lengths)
        tokens = sum(lengths)
        return LayerWork(
            tokens=tokens,
            pairs=sum(length * (length + 1) // 2 for length in lengths),
            rows=tokens if self.rows is None else self.rows[layer],
            scored=self.scored.get(layer, ()),
            depth_scored=self.depth_scored.get(layer, ()),
        )


class Costed(Protocol):
    """A model that states its own arithmetic."""

    @property
    def num_layers(self) -> int: ...

    def products(self, work: Work) -> Iterable[Iterable[Product]]:
        """Chains of products that follow one another; one begins where no gradient goes further back."""
        ...
