"""Accuracy on multiple-choice items. A model's answer is the option whose first token is most likely after the prompt.

Answering an item takes one forward pass, whether its options are letters or words. If the correct option begins with
the same token as another option, the item counts as wrong. If this is true of every item, the split is refused
(data/tasks/choice_items.py).

Shape suffixes: T tokens of a micro-batch, S samples of a micro-batch, N items, O options, R routing values of an item.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from moe_dist.config.recipe import DataConfig
from moe_dist.core.batch import Batch
from moe_dist.core.errors import UserError
from moe_dist.data.shards.sample_report import SampleReport
from moe_dist.data.shards.tars import Split
from moe_dist.data.stream.held_out_batches import held_out_batches
from moe_dist.data.stream.packing import DocumentStore
from moe_dist.data.tasks.choice_items import Choice, read_choices
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.evaluate.intervals import Interval, mcnemar, paired_difference, wilson
from moe_dist.losses.manifold import sample_routing
from moe_dist.parallel.agreement import gather_objects, raise_on_all_ranks
from moe_dist.parallel.layout import Layout

OVERALL = "overall"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A model's answers to N multiple-choice items, on the CPU. Each item occurs once. Items are sorted by sample_N."""

    sample_N: Tensor  # int64 hash of the prompt, from the batch's sidecar
    domain_N: Tensor  # int64 index into the data's domain names
    correct_N: Tensor  # int64 index of the correct option
    log_probs_NO: Tensor  # float32 log-probability of each option's first token among all tokens
    routing_NR: Tensor  # float32 routing of the last prompt token, all expert layers concatenated; R is 0 without any

    @property
    def right_N(self) -> Tensor:
        """Return bool [N]: true for each item whose correct option is more likely than every other option."""
        right_N1 = self.log_probs_NO.gather(1, self.correct_N[:, None])
        return (self.log_probs_NO >= right_N1).sum(dim=1) == 1


def answer_all(
    forward: Callable,
    store: DocumentStore,
    vocabulary: Vocabulary,
    data: DataConfig,
    layout: Layout,
    *,
    split: Split,
    batch_groups: int,
) -> Answers:
    """Let a model answer every item of a split. Collective.

    Rank 0 displays the progress. forward: as in `answer`. store: the documents of this split.
    """
    choices, batches = read_items(store, vocabulary, data, layout, split=split, batch_groups=batch_groups)
    return answer(forward, batches, choices, layout)


def read_items(
    store: DocumentStore,
    vocabulary: Vocabulary,
    data: DataConfig,
    layout: Layout,
    *,
    split: Split,
    batch_groups: int,
) -> tuple[Mapping[int, Choice], Iterable[Batch]]:
    """Return the items of a split, keyed by sample hash, and this rank's batches of them. Collective.

    All ranks have the same number of batches. Rank 0 displays the progress while it iterates over its batches.
    """
    with raise_on_all_ranks():
        choices, report = read_choices(data, split, vocabulary.text)
    if layout.is_main:
        _warn(choices, report)
    batches = held_out_batches(
        store, vocabulary, data, groups=len(store), dp_rank=layout.dp_rank, dp=layout.dp, batch_groups=batch_groups
    )
    return choices, track(list(batches), description="answering", disable=not layout.is_main)


def _warn(choices: Mapping[int, Choice], report: SampleReport) -> None:
    """Print how many items were left out, and how many are ambiguous. An ambiguous item always counts as wrong."""
    if report.bad:
        print(f"warning: {report.summary()}", file=sys.stderr, flush=True)
    ambiguous = sum(choice.ambiguous for choice in choices.values())
    if ambiguous:
        sentence = "count as wrong, because their correct option begins with the same token as another one"
        print(f"warning: {ambiguous} of {len(choices)} items {sentence}", file=sys.stderr, flush=True)


def answer(forward: Callable, batches: Iterable[Batch], choices: Mapping[int, Choice], layout: Layout) -> Answers:
    """Let a model answer the items in the batches. Return the answers of all ranks. Collective.

    Every rank must call this function with the same number of batches. Samples that are not in `choices` are left out.
    Raises UserError if no items remain.

    forward: a function from a Batch to an output with logits_TV and records.
    choices: the items, keyed by sample hash. All have the same number of options (data/tasks/choice_items.py).
    """
    return merge_answers(answers_of_all_ranks(forward, batches, choices, layout))


@torch.no_grad()
def answers_of_all_ranks(
    forward: Callable, batches: Iterable[Batch], choices: Mapping[int, Choice], layout: Layout
) -> list[Answers]:
    """Return the answers of all ranks, one entry for each batch that has items. Collective.

    The arguments are those of `answer`.
    """
    mine = []
    for batch in batches:
        batch = batch.to(layout.device)
        output = forward(batch)
        if any(sample in choices for sample in batch.sidecar.get("sample_S", torch.empty(0)).tolist()):
            mine.append(_answer_batch(output, batch, choices))
    return [answers for rank in gather_objects(mine) for answers in rank]


def merge_answers(parts: Sequence[Answers]) -> Answers:
    """Merge answers, keeping only the first answer to each item. Raises UserError if there are no answers."""
    if not parts:
        raise UserError("the split holds no instruction samples, so there is nothing to choose from")
    joined = {f.name: torch.cat([getattr(answers, f.name) for answers in parts]) for f in fields(Answers)}
    first_N = _first_of_each(joined["sample_N"])
    return Answers(**{name: value[first_N] for name, value in joined.items()})


def _answer_batch(output: Any, batch: Batch, choices: Mapping[int, Choice]) -> Answers:
    samples = batch.sidecar["sample_S"].tolist()
    kept_S = [place for place, sample in enumerate(samples) if sample in choices]
    end_S, sample_S = batch.sidecar["prompt_end_S"][kept_S], batch.sidecar["sample_S"][kept_S].cpu()
    items = [choices[sample] for sample in sample_S.tolist()]
    option_SO = torch.tensor([item.tokens for item in items], device=end_S.device)
    log_probs_SV = output.logits_TV[end_S].float().log_softmax(dim=1)
    routing_SR = log_probs_SV[:, :0]
    if output.records:
        routing_SR = sample_routing(output.records, end_S, batch.info.num_tokens).float()
    return Answers(
        sample_N=sample_S,
        domain_N=batch.sidecar["domain_T"][end_S].cpu(),
        correct_N=torch.tensor([item.correct for item in items], dtype=torch.int64),
        log_probs_NO=log_probs_SV.gather(1, option_SO).cpu(),
        routing_NR=routing_SR.cpu(),
    )


def _first_of_each(sample_N: Tensor) -> Tensor:
    """Return the index of each distinct sample's first occurrence, in ascending order of the samples' hashes."""
    unique_M, inverse_N = sample_N.unique(return_inverse=True)
    position_N = torch.arange(len(sample_N))
    return position_N.new_full((len(unique_M),), len(sample_N)).scatter_reduce(0, inverse_N, position_N, "amin")


# ------------------------------------------------------------------------------------------------------------ results


@dataclass(frozen=True, slots=True)
class Result:
    """A model's result: for each item of each task, whether the model answered it correctly."""

    right: Mapping[str, Mapping[int, bool]]  # task -> sample -> right

    @classmethod
    def of(cls, answers: Answers, domains: Sequence[str]) -> Result:
        right: dict[str, dict[int, bool]] = {domains[d]: {} for d in sorted(set(answers.domain_N.tolist()))}
        rows = zip(answers.sample_N.tolist(), answers.domain_N.tolist(), answers.right_N.tolist())
        for sample, domain, is_right in rows:
            right[domains[domain]][sample] = is_right
        return cls(right)

    def to_json(self) -> dict[str, Any]:
        """Return each task's accuracy with its interval, and whether each item was answered correctly.

        The individual results are needed to compare models later.
        """
        return {
            "accuracy": {
                task: {"right": sum(items.values()), "items": len(items), "share": share, "interval_95": interval}
                for task, items in self.tasks().items()
                for share, interval in [accuracy(items)]
            },
            "right": {task: {str(sample): r for sample, r in items.items()} for task, items in self.right.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        right = data["right"].items()
        return cls({task: {int(sample): bool(r) for sample, r in items.items()} for task, items in right})

    def tasks(self) -> dict[str, Mapping[int, bool]]:
        """Return a dict from each task to its results. The key "overall" holds the results of all tasks.

        The results of a task are a dict from each item's sample hash to whether the item was answered correctly.
        """
        return {**self.right, OVERALL: {sample: r for items in self.right.values() for sample, r in items.items()}}


def accuracy(items: Mapping[int, bool]) -> tuple[float, Interval]:
    """Return the fraction of items that were answered correctly, and its 95 % Wilson interval."""
    right = sum(items.values())
    return right / len(items), wilson(right, len(items))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of two models on the same items, based on the items that only one of them answered correctly."""

    gained: int  # items that only the second model answers correctly
    lost: int  # items that only the first model answers correctly
    items: int

    @classmethod
    def of(cls, first: Mapping[int, bool], second: Mapping[int, bool]) -> Comparison:
        """Compare the results of two models. Raises UserError if the models did not answer the same items."""
        if first.keys() != second.keys():
            common = len(first.keys() & second.keys())
            raise UserError(
                f"models can only be compared on the same items: one answered {len(first)}, the other {len(second)}, "
                f"{common} in common"
            )
        gained = sum(second[sample] and not right for sample, right in first.items())
        lost = sum(right and not second[sample] for sample, right in first.items())
        return cls(gained, lost, len(first))

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.items

    def to_json(self) -> dict[str, Any]:
        return {
            "difference": self.difference,
            "interval_95": paired_difference(self.gained, self.lost, self.items),
            "gained": self.gained,
            "lost": self.lost,
            "mcnemar_p": mcnemar(self.gained, self.lost),
        }
