"""Held-out batches: a finite series, with the same selection groups in every run and every parallel layout.

The groups are made in one pass over the held-out store, in an order that depends neither on the seed nor on the number
of ranks. Documents are packed as in training, but without caption dropout. Group j is read by rank j mod dp. If a rank
would have one group fewer than other ranks, it gets a group of padding. Therefore all ranks run the same number of
forward passes, and sums over ranks count every token once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from moe_dist.config.recipe import DataConfig
from moe_dist.core.batch import Batch
from moe_dist.core.errors import UserError
from moe_dist.data.stream.lanes import make_lanes
from moe_dist.data.stream.packing import Assembler, Document, DocumentStore, Group, collate
from moe_dist.data.tasks.instructions import InstructionPrompt
from moe_dist.data.tokenizers.vocabulary import Vocabulary


def whole_captions(store: DocumentStore, vocabulary: Vocabulary, data: DataConfig) -> Assembler:
    """Create an assembler that drops no captions and does not depend on the run's seed.

    If an image has several captions, the assembler uses the first one.
    """
    return Assembler(
        store=store,
        vocabulary=vocabulary,
        seed=0,
        sequence_length=data.sequence_length,
        image_first=data.image_first,
        caption_dropout=0.0,
        every_caption=False,
    )


def held_out_batches(
    store: DocumentStore,
    vocabulary: Vocabulary,
    data: DataConfig,
    *,
    groups: int,
    dp_rank: int,
    dp: int,
    batch_groups: int,
) -> Iterator[Batch]:
    """Yield the micro-batches of data-parallel rank `dp_rank`. The number of ranks is `dp`.

    All ranks together read the first `groups` selection groups of the store, or all groups if there are fewer. Raises
    UserError if the store is empty or cannot reach data.image_fraction.

    batch_groups: the number of selection groups per micro-batch.
    """
    assembler = whole_captions(store, vocabulary, data)
    if not len(store):
        raise UserError("the held-out split holds no documents: check data.validation_shards")
    plan = list(islice(_pass(assembler, data), groups))
    padding: Group = [[]] * data.group_sequences
    rounds = -(-len(plan) // dp)
    plan += [padding] * (rounds * dp - len(plan))
    mine = [(number, plan[number]) for number in range(dp_rank, len(plan), dp)]
    for start in range(0, rounds, batch_groups):
        groups_now = mine[start : start + batch_groups]
        yield collate(groups_now, vocabulary, data.sequence_length, instructions=bool(store.domains))


def _pass(assembler: Assembler, data: DataConfig) -> Iterator[Group]:
    lane = make_lanes(assembler, data, numbers=[0], lanes=1, epochs=1)[0]
    while any(group := lane.next_group()):
        yield group


@dataclass(frozen=True)
class _Mixed:
    text: np.ndarray
    image: np.ndarray | None
    prompt: InstructionPrompt | None


class ShuffledCaptions:
    """A document store in which the captions are shuffled among the image-text pairs.

    No image keeps its own caption or gets an identical one. A caption moves to a pair whose own caption has about the
    same length, so the packing hardly changes. A model that uses captions should have a higher loss on the images of
    this store than on those of the original store. Raises UserError if more than half of the pairs share one caption.
    """

    def __init__(self, store: DocumentStore):
        self._store = store
        self.has_image = np.asarray(store.has_image)
        self.domains, self.part_ends = store.domains, store.part_ends
        pairs = np.flatnonzero(self.has_image)
        captions = {int(i): np.ascontiguousarray(store.document(int(i)).text).tobytes() for i in pairs}
        # Sort by length. Captions of one length are in random order, but equal captions are adjacent. A shift by the
        # size of the largest set of equal captions then gives every pair a different caption.
        order = sorted(captions, key=lambda i: (len(captions[i]), hashlib.sha256(captions[i]).digest(), i))
        shift = max(Counter(captions.values()).values(), default=0)
        if 2 * shift > len(order):
            raise UserError(f"captions cannot be shuffled: {shift} of {len(order)} held-out pairs share one caption")
        self._caption_of = dict(zip(order, order[shift:] + order[:shift], strict=True))
        self.lengths = np.asarray(store.lengths).copy()
        item = {i: len(store.document(i).text) for i in order}
        for i, other in self._caption_of.items():
            self.lengths[i] += item[other] - item[i]

    def __len__(self) -> int:
        return len(self._store)

    def document(self, index: int, choice: int = 0) -> Document:
        document = self._store.document(index, choice)
        if index not in self._caption_of:
            return document
        other = self._store.document(self._caption_of[index], choice)
        return _Mixed(text=other.text, image=document.image, prompt=other.prompt)
