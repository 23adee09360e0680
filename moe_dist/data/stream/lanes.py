"""Lanes: a fixed number of data streams, which make the order of the data independent of the number of ranks.

The documents of a store are split into data.lanes contiguous ranges whose sizes differ by at most one. If data.shards
lists several corpora, each corpus is split separately, so every lane has its share of every corpus. In training, a lane
is infinite: it reads its documents again in every epoch, each time in a new order. A lane with fewer or shorter
documents begins its next epoch earlier than the others. No lane waits for another, and no document is left out.
Everything that depends on the order of documents happens inside a lane: shuffling, packing, and mixing of modalities
and corpora. Selection group j of a run is group j // lanes of lane j mod lanes.

With data.weights, a lane reads each corpus in an order of its own, and takes documents from them in proportion to the
weights (WeightedStream). The weights count documents, not tokens.

A lane's state consists of the states of its streams of pieces. A stream's state is its epoch, its position in the
epoch, and the (epoch, document, start) of each piece that has been read but not yet packed. On resume, these pieces are
made again from their documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.data.stream.packing import Assembler, Group, Piece, fill_sequence, random_bits, reachable_image_fraction

LOOK_AHEAD = 64  # number of pieces that a stream holds for the packer to choose from


class Order:
    """The endless order in which a lane reads documents: all of them in every epoch, each time in a new order.

    number: the number of this order in its lane. Orders with different numbers are shuffled differently.
    """

    def __init__(self, documents: np.ndarray, seed: int, *, lane: int, number: int = 0):
        self._documents, self._seed, self._lane, self._number = documents, seed, lane, number
        self.epoch, self.cursor = 0, 0
        self._order = self._permutation()

    @property
    def drawn(self) -> int:
        """Return the number of documents that have been read, over all epochs."""
        return self.epoch * len(self._documents) + self.cursor

    def draw(self) -> tuple[int, int]:
        """Return the epoch and the number of the next document."""
        epoch, document = self.epoch, int(self._order[self.cursor])
        self.cursor += 1
        if self.cursor == len(self._order):
            self.restore({"epoch": epoch + 1, "cursor": 0})
        return epoch, document

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        bits = random_bits(self._seed, (self._lane, self.epoch, 1 + self._number), len(self._documents))
        return self._documents[np.argsort(bits, kind="stable")]


class Stream:
    """A stream of pieces, made from the given documents. Each epoch goes through the documents in a new order.

    The list `pending` contains the pieces that have been read ahead, oldest first.
    """

    def __init__(self, documents: np.ndarray, assembler: Assembler, *, lane: int, epochs: int | None = None):
        self._assemble = assembler
        self._order = Order(documents, assembler.seed, lane=lane)
        self._epochs = epochs  # None: infinite
        self.pending: list[Piece] = []

    def refill(self) -> list[Piece]:
        """Read ahead until `pending` has LOOK_AHEAD pieces or the last epoch ends, and return it."""
        while len(self.pending) < LOOK_AHEAD and self._order.epoch != self._epochs:
            self.pending.append(self._assemble(*self._order.draw()))
        return self.pending

    def state(self) -> dict[str, Any]:
        return {**self._order.state(), "pending": _stored(self.pending)}

    def restore(self, state: dict[str, Any]) -> None:
        self._order.restore(state)
        self.pending = [self._assemble(*piece) for piece in state["pending"]]


class WeightedStream:
    """An endless stream of pieces that mixes corpora by weight.

    At any time, the numbers of documents read from the corpora are proportional to the weights, to within one or two
    documents. The next document comes from the corpus with the smallest (documents read + 1/2) / weight; in a tie,
    from the first one (the method of Sainte-Lague). This choice is not random, so a stream's state needs only the
    orders of its corpora and `pending`. Each corpus has its own epochs: it begins again when all of its documents have
    been read.
    """

    def __init__(self, parts: Sequence[np.ndarray], weights: Sequence[float], assembler: Assembler, *, lane: int):
        """parts: for each corpus, the numbers of its documents in this lane."""
        self._assemble, self._weights = assembler, weights
        self._orders = [Order(part, assembler.seed, lane=lane, number=i) for i, part in enumerate(parts)]
        self.pending: list[Piece] = []

    def refill(self) -> list[Piece]:
        """Read ahead until `pending` has LOOK_AHEAD pieces, and return it."""
        while len(self.pending) < LOOK_AHEAD:
            shares = [(order.drawn + 0.5) / weight for order, weight in zip(self._orders, self._weights, strict=True)]
            self.pending.append(self._assemble(*self._orders[shares.index(min(shares))].draw()))
        return self.pending

    def state(self) -> dict[str, Any]:
        return {"orders": [order.state() for order in self._orders], "pending": _stored(self.pending)}

    def restore(self, state: dict[str, Any]) -> None:
        for order, saved in zip(self._orders, state["orders"], strict=True):
            order.restore(saved)
        self.pending = [self._assemble(*piece) for piece in state["pending"]]


def _stored(pending: Sequence[Piece]) -> list[list[int]]:
    return [[piece.epoch, piece.document, piece.start] for piece in pending]


class Lane:
    """A stream of selection groups, packed from one stream of pieces."""

    def __init__(self, stream: Stream | WeightedStream, data: DataConfig):
        self._stream = stream
        self._data = data

    def next_group(self) -> Group:
        """Return the next group: for each sequence, the list of its pieces.

        After the last epoch, all lists are empty.
        """
        length = self._data.sequence_length
        return [fill_sequence(self._stream.refill(), length) for _ in range(self._data.group_sequences)]

    def state(self) -> dict[str, Any]:
        return {"all": self._stream.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self._stream.restore(state["all"])


class SteeredLane:
    """A stream of selection groups whose fraction of image tokens is kept close to data.image_fraction.

    The fraction is the number of image tokens in a group, divided by the number of its tokens without padding. Pairs
    and texts come from separate streams. First, pairs are added to a sequence until the group's number of image tokens
    is as close as possible to its target. Then texts are added, which lowers the fraction. The number
    of texts is limited: with them, the group may have at most half an image's tokens too few for the fraction.

    If data.image_fraction is close to the largest possible value, there is room for little text, and sequences end in
    padding.
    """

    def __init__(self, pairs: Stream, texts: Stream, data: DataConfig, fraction: float):
        self._pairs, self._texts = pairs, texts
        self._data = data
        self._fraction = fraction

    def next_group(self) -> Group:
        """Return the next group, in the same form as Lane.next_group()."""
        group: list[list[Piece]] = []
        used = image = 0
        for i in range(self._data.group_sequences):
            target = self._fraction * (i + 1) * self._data.sequence_length
            sequence, half_image = self._take_pairs(target - image)
            image += sum(piece.image_tokens for piece in sequence)
            taken = sum(map(len, sequence))
            room = self._data.sequence_length - taken
            if self._fraction:
                room = min(room, int((image + half_image) / self._fraction) - used - taken)
            sequence += fill_sequence(self._texts.refill(), max(room, 0))
            used += sum(map(len, sequence))
            group.append(sequence)
        return group

    def _take_pairs(self, wanted: float) -> tuple[list[Piece], float]:
        """Take pairs for one sequence until their number of image tokens is as close to `wanted` as possible.

        Returns the pairs, and half the number of tokens of one image. When next_group() has added texts, the group
        may lack this many image tokens at most.
        """
        taken: list[Piece] = []
        room, half = self._data.sequence_length, 0.0
        while pending := self._pairs.refill():
            fitting = next((i for i, piece in enumerate(pending) if len(piece) <= room), None)
            half = pending[0].image_tokens / 2
            if fitting is None or wanted < half:
                break
            piece = pending.pop(fitting)
            taken.append(piece)
            room -= len(piece)
            wanted -= piece.image_tokens
        return taken, half

    def state(self) -> dict[str, Any]:
        return {"pairs": self._pairs.state(), "texts": self._texts.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self._pairs.restore(state["pairs"])
        self._texts.restore(state["texts"])


Lanes = dict[int, Lane | SteeredLane]


def make_lanes(
    assembler: Assembler, data: DataConfig, *, numbers: Iterable[int], lanes: int, epochs: int | None = None
) -> Lanes:
    """Split the store's documents into `lanes` lanes. Return those whose numbers are in `numbers`, keyed by number.

    Raises UserError if the store has too few documents or cannot reach data.image_fraction.

    epochs: the number of passes over the documents. If it is None, the lanes are infinite. Only infinite lanes use
    data.weights.
    """
    if data.weights is not None and epochs is None:
        return _weighted_lanes(assembler, data, data.weights, numbers, lanes)
    has_image = np.asarray(assembler.store.has_image)
    if data.image_fraction is None:
        ranges = _ranges(np.arange(len(assembler.store)), assembler.store.part_ends, lanes, "documents")
        return {n: Lane(Stream(ranges[n], assembler, lane=n, epochs=epochs), data) for n in numbers}
    _check_fraction(assembler, data.image_fraction)
    pairs = _ranges(np.flatnonzero(has_image), assembler.store.part_ends, lanes, "image-text pairs")
    texts = _ranges(np.flatnonzero(~has_image), assembler.store.part_ends, lanes, "text-only documents")
    return {
        n: SteeredLane(
            Stream(pairs[n], assembler, lane=n, epochs=epochs),
            Stream(texts[n], assembler, lane=n, epochs=epochs),
            data,
            data.image_fraction,
        )
        for n in numbers
    }


def _weighted_lanes(
    assembler: Assembler, data: DataConfig, weights: Sequence[float], numbers: Iterable[int], lanes: int
) -> Lanes:
    documents, ends = np.arange(len(assembler.store)), assembler.store.part_ends
    parts = []
    for number, part in enumerate(np.split(documents, ends[:-1]), 1):
        kind = f"samples in entry {number} of data.shards (data.weights is set)"
        parts.append(_ranges(part, np.array([len(part)]), lanes, kind))
    return {n: Lane(WeightedStream([ranges[n] for ranges in parts], weights, assembler, lane=n), data) for n in numbers}


def _ranges(documents: np.ndarray, part_ends: np.ndarray, lanes: int, kind: str) -> list[np.ndarray]:
    """Split each corpus among the lanes, and return the document numbers of each lane in ascending order.

    Raises UserError if there are fewer documents than lanes.

    documents: the numbers of the documents to split.
    part_ends: for each corpus, the number of its last document plus one.
    kind: the word for these documents in the error message.
    """
    if len(documents) < lanes:
        raise UserError(f"data.lanes={lanes} needs at least as many {kind}, the shards hold {len(documents)}")
    ranges: list[list[np.ndarray]] = [[] for _ in range(lanes)]
    first = 0  # the next lane to get one document more than the others
    for part in np.split(documents, np.searchsorted(documents, part_ends[:-1])):
        for number, share in enumerate(np.array_split(part, lanes)):
            ranges[(first + number) % lanes].append(share)
        first = (first + len(part)) % lanes
    return [np.concatenate(shares) for shares in ranges]


def _check_fraction(assembler: Assembler, fraction: float) -> None:
    most = reachable_image_fraction(assembler)
    if np.asarray(assembler.store.has_image).all():
        reason = f"without text-only documents to mix in, these shards give {most:.3f}"
    elif fraction > most:
        reason = f"with these shards it can be 0 to {most:.3f}"
    else:
        return
    raise UserError(f"data.image_fraction={fraction} cannot be met: {reason}")
