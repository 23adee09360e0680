"""Iteration over a held-out split: number of groups, order and this rank's share."""

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
    """The part of a held-out split to evaluate.

    groups: number of selection groups over all ranks. batch_groups: selection groups of a rank in one forward pass.
    """

    vocabulary: Vocabulary
    data: DataConfig
    layout: Layout
    groups: int
    batch_groups: int

    @classmethod
    def of(cls, config: Config, vocabulary: Vocabulary, layout: Layout) -> HeldOutSplit:
        """Return the part that a recipe's `eval` section selects."""
        return cls(vocabulary, config.data, layout, config.eval.groups, config.train.micro_batch_groups)

    def batches(self, store: DocumentStore) -> Iterator[Batch]:
        """Yield this rank's micro-batches of a store."""
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
        """Return a copy in which every pair has this order and the recipe's mix of text and images is ignored."""
        return replace(
            self, data=self.data.model_copy(update={"image_first": float(image_first), "image_fraction": None})
        )
