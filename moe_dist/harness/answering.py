"""Answers of a model to token requests: log-likelihoods of continuations, and generated continuations.

All ranks get the same requests, and every rank returns all answers. The requests are sorted by length and distributed
round-robin over the data-parallel ranks. The ranks step together, because experts may be on other ranks: a rank that
has no more requests feeds a padding token to its model until every rank is done. An answer does not depend on the
number of ranks or on the other requests. Inputs longer than the context are cut from the left.

Shape suffixes: T tokens of a micro-batch, C tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from rich.progress import track
from torch import Tensor

from moe_dist.config.recipe import Config
from moe_dist.core.batch import TokenInfo
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.generate.decode import check_can_generate, generate
from moe_dist.generate.sampling import Sampling
from moe_dist.harness.stopping import StopSettings, TextUntil
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.agreement import gather_objects
from moe_dist.parallel.layout import Layout

Ids = Sequence[int]
Score = tuple[float, bool]  # log-likelihood of a continuation; whether greedy decoding would produce it


@dataclass(frozen=True, slots=True)
class _Reading:
    """An input of the model, and the requests that are scored with its logits."""

    ids: tuple[int, ...]
    requests: list[int]  # indices of requests


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweringModel:
    """A model that answers requests. Raises UserError if the model's routing cannot be causal."""

    model: Transformer
    vocabulary: Vocabulary
    layout: Layout
    context: int  # maximum number of tokens that the model reads
    budget: int  # maximum number of tokens in a micro-batch
    on_step: Callable[[], None] = lambda: None  # called after each forward pass
    shown: bool = False  # display the progress on rank 0

    def __post_init__(self) -> None:
        check_can_generate(self.model)

    @classmethod
    def of(cls, config: Config, model: Transformer, vocabulary: Vocabulary, layout: Layout) -> AnsweringModel:
        """Create an AnsweringModel with the recipe's limits.

        The model reads at most data.sequence_length tokens of a text. A micro-batch has at most as many tokens as in
        training.
        """
        context = config.data.sequence_length
        budget = config.train.micro_batch_groups * config.data.group_sequences * context
        return cls(model=model, vocabulary=vocabulary, layout=layout, context=context, budget=budget)

    # ------------------------------------------------------------------------------------------------ log-likelihoods

    @torch.no_grad()
    def score(self, requests: Sequence[tuple[Ids, Ids]]) -> list[Score]:
        """Return the score of each request. Collective: all ranks must pass the same requests.

        requests: pairs of a text and its continuation. Each continuation must have at least 1 token and at most
        `self.context` tokens.
        """
        readings = self._readings(requests)
        of_ranks = [list(self._micro_batches(readings[rank :: self.layout.dp])) for rank in range(self.layout.dp)]
        mine = of_ranks[self.layout.dp_rank]
        rounds = range(max((len(batches) for batches in of_ranks), default=0))
        scores: dict[int, Score] = {}
        for number in track(rounds, "log-likelihoods", disable=not (self.shown and self.layout.is_main)):
            batch = mine[number] if number < len(mine) else []
            logits_TV = self._forward(batch)
            scores |= _scores(logits_TV, batch, requests)
            self.on_step()
        everyone = {number: score for of_rank in gather_objects(scores) for number, score in of_rank.items()}
        return [everyone[number] for number in range(len(requests))]

    def _readings(self, requests: Sequence[tuple[Ids, Ids]]) -> list[_Reading]:
        """Return the inputs of the requests, longest first. Requests with the same input share a reading.

        The options of a multiple-choice item often differ in their last token only, which is not part of the input.
        """
        readings: dict[tuple[int, ...], _Reading] = {}
        for number, (before, continuation) in enumerate(requests):
            ids = (*before, *continuation)[-(self.context + 1) : -1]
            readings.setdefault(ids, _Reading(ids, [])).requests.append(number)
        return sorted(readings.values(), key=lambda reading: (-len(reading.ids), reading.ids))

    def _micro_batches(self, readings: Sequence[_Reading]) -> Iterator[list[_Reading]]:
        batch: list[_Reading] = []
        tokens = 0
        for reading in readings:
            if batch and tokens + len(reading.ids) > self.budget:
                yield batch
                batch, tokens = [], 0
            batch.append(reading)
            tokens += len(reading.ids)
        if batch:
            yield batch

    def _forward(self, batch: Sequence[_Reading]) -> Tensor:
        """Return the logits of a micro-batch whose documents are the readings.

        If there are no readings, the model reads one padding token.
        """
        documents = [reading.ids for reading in batch] or [(self.vocabulary.pad,)]
        tokens_T = torch.tensor([token for ids in documents for token in ids])
        lengths = [len(ids) for ids in documents]
        info = TokenInfo.build(
            modality_T=self.vocabulary.modality_of[tokens_T],
            valid_T=torch.full_like(tokens_T, bool(batch), dtype=torch.bool),
            position_T=torch.cat([torch.arange(length) for length in lengths]),
            token_id_T=torch.arange(len(tokens_T)),
            document_lengths=lengths,
            num_groups=1,
        )
        device = self.layout.device
        return self.model(tokens_T.to(device), info.causally().to(device)).logits_TV

    # ----------------------------------------------------------------------------------------------------- generation

    def complete(self, prompts: Sequence[Ids], settings: StopSettings, sampling: Sampling) -> list[list[int]]:
        """Return the generated tokens that continue each prompt, including EOS or the stop string that ended them.

        Collective: all ranks must pass the same arguments. A prompt is cut from the left so that it fits into the
        context together with settings.max_tokens, which must be less than the context.
        """
        form = TextUntil(self.vocabulary, self.context, settings)
        cut = [tuple(prompt[-(self.context - settings.max_tokens) :]) for prompt in prompts]
        order = sorted(range(len(cut)), key=lambda number: (-len(cut[number]), number))
        together = self.layout.dp * max(1, self.budget // self.context)
        starts = range(0, len(order), together)
        mine: dict[int, list[int]] = {}
        for start in track(starts, "continuations", disable=not (self.shown and self.layout.is_main)):
            numbers = order[start : start + together][self.layout.dp_rank :: self.layout.dp]
            states = [form.start_text(number, cut[number]) for number in numbers]
            generate(self.model, states, form, sampling, self.layout, lambda left: self.on_step())
            mine |= {state.number: state.generated for state in states}
        everyone = {number: ids for of_rank in gather_objects(mine) for number, ids in of_rank.items()}
        return [everyone[number] for number in range(len(prompts))]


def _scores(
    logits_TV: Tensor, batch: Sequence[_Reading], requests: Sequence[tuple[Ids, Ids]]
) -> Iterator[tuple[int, Score]]:
    """Yield the index and the score of every request of a micro-batch."""
    for reading, end in zip(batch, accumulate(len(reading.ids) for reading in batch)):
        longest = max(len(requests[number][1]) for number in reading.requests)
        logits_CV = logits_TV[end - longest : end]
        log_probs_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)).log_softmax(dim=1)
        best_C = log_probs_CV.argmax(dim=1)
        for number in reading.requests:
            target_C = torch.tensor(requests[number][1], device=logits_TV.device)
            count = len(target_C)
            total = log_probs_CV[-count:].gather(1, target_C[:, None]).double().sum()
            yield number, (float(total), bool((best_C[-count:] == target_C).all()))
