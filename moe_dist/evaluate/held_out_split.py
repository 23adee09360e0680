"""Iteration over a held-out split: how many groups are evaluated, in which order, and which of them this rank reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe_dist.config.recipe import Config, DataConfig
from moe_dist.core.batch import Batch
from moe_dist.data.stream.held_out_batches import held_out_batches
from moe_dist.data.stream.packing import DocumentStore
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.parallel.layout import Layout


@dataclass(frozen=True)
class HeldOutSplit:
    """The part of a held-out split that is evaluated, and how it is divided into this rank's micro-batches.

    groups: number of selection groups over all ranks. batch_groups: number of selection groups per micro-batch.
    """

    vocabulary: Vocabulary
    data: DataConfig
    layout: Layout
    groups: int
    batch_groups: int

    @classmethod
    def of(cls, config: Config, vocabulary: Vocabulary, layout: Layout) -> HeldOutSplit:
        """Return the part of the split that the recipe's `eval` section selects."""
        return cls(vocabulary, config.data, layout, config.eval.groups, config.train.micro_batch_groups)

    def batches(self, store: DocumentStore) -> Iterator[Batch]:
        """Yield this rank's micro-batches of the documents in `store`."""
        return held_out_batches(
            store,
            self.vocabulary,
            self.data,
            groups=self.groups,
            dp_rank=self.layout.dp_rank,
            dp=self.layout.dp,
            batch_groups=self.batch_groups,
        )

    def ordered(self, *, image_first: bool) -> HeldOutSplit:
        """Return a copy in which every pair begins with its image (image_first) or with its caption (not image_first).

        The copy ignores the recipe's data.image_fraction.
        """
        return replace(
            self, data=self.data.model_copy(update={"image_first": float(image_first), "image_fraction": None})
        )
