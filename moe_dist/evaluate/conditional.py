"""Held-out loss of one modality given the other: captions after their image, and images after their caption.

The exponential of this loss is the conditional perplexity that the MoMa paper (arXiv 2407.21770) reports for auxiliary
routers.

Shape suffixes: T tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.core.batch import IMAGE, Batch
from moe_dist.data.stream.packing import Document, DocumentStore
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.evaluate.held_out_split import HeldOutSplit
from moe_dist.evaluate.perplexity import evaluate


class Pairs:
    """A document store that contains only the image-text pairs of another store, not its texts and instructions."""

    domains: tuple[str, ...] = ()

    def __init__(self, store: DocumentStore):
        pairs = np.flatnonzero(store.has_image)
        self._store = store
        self._numbers = [int(i) for i in pairs if not store.domains or store.document(int(i)).prompt is None]
        self.has_image = np.ones(len(self._numbers), dtype=bool)
        self.lengths = np.asarray(store.lengths)[self._numbers]
        self.part_ends = np.array([len(self._numbers)])

    def __len__(self) -> int:
        return len(self._numbers)

    def document(self, index: int, choice: int = 0) -> Document:
        return self._store.document(self._numbers[index], choice)


def conditional_losses(forward: Callable, store: DocumentStore, held_out: HeldOutSplit) -> dict[str, float]:
    """Measure the conditional losses of a store's pairs in nats per token. Collective.

    Returns eval/image_to_text (loss of captions and their EOS) and eval/text_to_image (loss of image codes). The result
    is empty if the store has no pairs.
    held_out: the part of the pairs to evaluate for each loss.
    """
    pairs = Pairs(store)
    if not len(pairs):
        return {}
    found = {}
    for key, image_first in (("eval/image_to_text", True), ("eval/text_to_image", False)):
        batches = held_out.ordered(image_first=image_first).batches(pairs)
        masked = (replace(b, loss_mask_T=_counted(b, held_out.vocabulary, image_first)) for b in batches)
        losses = evaluate(forward, masked, held_out.layout)
        if losses:
            found[key] = losses["eval/loss"]
    return found


def _counted(batch: Batch, vocabulary: Vocabulary, image_first: bool) -> Tensor:
    """Return a mask, bool [T], of the positions at which the prediction is evaluated.

    If image_first is true, these are the positions that predict the caption and the EOS of each pair. Otherwise, they
    are the positions that predict the image codes.
    """
    if not image_first:
        return batch.loss_mask_T & (batch.target_modality_T == IMAGE)
    assert vocabulary.eoi is not None
    images_T = batch.tokens_T.eq(vocabulary.eoi).cumsum(0)
    begin_T = torch.arange(len(images_T)) - batch.info.position_T  # start of the token's document
    return batch.loss_mask_T & (images_T > F.pad(images_T, (1, 0))[begin_T])
