"""How a held-out split is looked at: how much of it, in which order, and this rank's share."""

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
    """groups: selection groups that are looked at, of all ranks; batch_groups: of a rank, in one forward pass."""

    vocabulary: Vocabulary
    data: DataConfig
    layout: Layout
    groups: int
    batch_groups: int

    @classmethod
    def of(cls, config: Config, vocabulary: Vocabulary, layout: Layout) -> HeldOutSplit:
        """Return what a recipe's `eval` section asks for."""
        return cls(vocabulary, config.data, layout, config.eval.groups, config.train.micro_batch_groups)

    def batches(self, store: DocumentStore) -> Iterator[Batch]:
        """This rank's micro-batches of the store."""
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
        """The same for pairs in one order, whatever mix of text and images is trained on."""
        return replace(
            self, data=self.data.model_copy(update={"image_first": float(image_first), "image_fraction": None})
        )
