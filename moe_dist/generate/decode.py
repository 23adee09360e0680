"""Token-by-token decoding with a KV cache. Every rank decodes its own samples.

Models whose routing depends on later tokens are refused. All ranks decode in step, because experts may be on other
ranks. A rank whose samples are all done feeds padding to its model until every rank is done. The result for a sample
does not depend on the rank that decodes it or on the other samples of that rank.

Shape suffixes: K kinds of next token (DocumentFormat.next), R rows (documents in the cache), S samples, T tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.core.batch import TokenInfo
from moe_dist.core.errors import UserError
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.generate.prompt import GenerationState
from moe_dist.generate.sampling import Sampling, choose, guide
from moe_dist.model.kv_cache import KVCache
from moe_dist.model.moe.token_choice import TokenChoiceRouter
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout

OnStep = Callable[[int], None]  # called after every step with the number of unfinished samples over all ranks


class DocumentFormat(Protocol):
    """Interface of the rules for generated tokens: which tokens may follow, and when a sample is done.

    Implemented by Format (generate/prompt.py) and TextUntil (harness/stopping.py).
    """

    vocabulary: Vocabulary
    context: int  # no sample is longer than this
    masks_KV: Tensor  # bool; K: kinds of next token

    def next(self, sample: GenerationState) -> int: ...

    def add(self, sample: GenerationState, token: int) -> None: ...


def check_can_generate(model: Transformer) -> None:
    """Raise UserError if the model cannot generate because its routing depends on later tokens or on other samples."""
    if not model.can_route_causally:
        raise UserError(
            "the model's routing depends on later tokens (expert choice, mixture-of-depths), so it cannot generate "
            "token by token: train auxiliary routers first (docs/moma.md)"
        )
    for module in model.modules():
        if isinstance(module, TokenChoiceRouter) and module.settings.capacity_factor is not None:
            raise UserError(
                "with a capacity, a sample would depend on the other samples of its batch: set capacity_factor of "
                "model.ffn.router to null"
            )


@dataclass(slots=True)
class _Row:
    """A document in the KV cache: either a sample, or its copy without the caption, which guidance needs."""

    sample: GenerationState
    unconditional: bool
    feed: tuple[int, ...]  # tokens to read next
    read: int = 0  # tokens read so far


@torch.no_grad()
def generate(
    model: Transformer,
    samples: Sequence[GenerationState],
    form: DocumentFormat,
    sampling: Sampling,
    layout: Layout,
    on_step: OnStep,
) -> None:
    """Generate all remaining tokens of this rank's samples. Collective: a rank without samples must call it, too.

    The tokens are appended to the samples. on_step: called after each decoding step with the number of unfinished
    samples over all ranks.
    """
    device, dtype = layout.device, model.embedding.weight.dtype
    rows = [_Row(sample, False, sample.prompt.tokens) for sample in samples]
    if sampling.guidance != 1:
        rows += [_Row(s, True, s.prompt.unconditional) for s in samples if s.prompt.unconditional is not None]
    capacity = max((sample.limit for sample in samples), default=1)
    cache = KVCache(model.config, sequences=len(rows), capacity=capacity, device=device, dtype=dtype)
    masks_KV = form.masks_KV.to(device)
    while True:
        live = [number for number, row in enumerate(rows) if not row.sample.done]
        tokens_T, info = _micro_batch([rows[number] for number in live], form)
        output = model(tokens_T.to(device), info.causally().to(device), cache.go_on(live or [cache.padding]))
        if live:
            ends = [end - 1 for end in accumulate(info.document_lengths)]
            _extend([rows[number] for number in live], output.logits_TV[ends], form, sampling, masks_KV)
        left = torch.tensor(sum(not sample.done for sample in samples), device=device)
        if layout.dp_group is not None:
            dist.all_reduce(left, group=layout.dp_group)
        on_step(int(left))
        if not left:
            return


def _micro_batch(rows: Sequence[_Row], form: DocumentFormat) -> tuple[Tensor, TokenInfo]:
    """Build a micro-batch on the CPU from the tokens in the rows' `feed`.

    Also increase each row's `read` by the number of tokens in its `feed`. If there are no rows, the micro-batch is a
    single padding token.
    """
    feeds = [row.feed for row in rows] or [(form.vocabulary.pad,)]
    starts = [row.read for row in rows] or [0]
    # Token ids are unique, and those of a sample do not depend on the other samples.
    names = [(2 * row.sample.number + row.unconditional) * form.context for row in rows] or [0]
    tokens_T = torch.tensor([token for feed in feeds for token in feed])
    position_T = torch.cat([torch.arange(start, start + len(feed)) for start, feed in zip(starts, feeds)])
    lengths = [len(feed) for feed in feeds]
    info = TokenInfo.build(
        modality_T=form.vocabulary.modality_of[tokens_T],
        valid_T=torch.full_like(tokens_T, bool(rows), dtype=torch.bool),
        position_T=position_T,
        token_id_T=position_T + torch.tensor(names).repeat_interleave(torch.tensor(lengths)),
        document_lengths=lengths,
        num_groups=1,
    )
    for row in rows:
        row.read += len(row.feed)
    return tokens_T, info


def _extend(
    rows: Sequence[_Row], logits_RV: Tensor, form: DocumentFormat, sampling: Sampling, masks_KV: Tensor
) -> None:
    """Draw the next token of every sample and append it to the sample.

    The token also becomes the `feed` of the sample's rows, so the model reads it in the next step.
    logits_RV: the logits after each row's last token. masks_KV: for each kind of token (DocumentFormat.next), which
    tokens of the vocabulary are allowed.
    """
    device = logits_RV.device
    place = {(row.sample.number, row.unconditional): number for number, row in enumerate(rows)}
    samples = [row.sample for row in rows if not row.unconditional]
    logits_RV = logits_RV[:, : masks_KV.shape[1]]  # rows of a padded vocabulary beyond the tokenizers' ids
    logits_SV = logits_RV[[place[sample.number, False] for sample in samples]]
    if len(samples) < len(rows):  # without an unconditional row, compare the sample with itself
        other = [place.get((sample.number, True), place[sample.number, False]) for sample in samples]
        logits_SV = guide(logits_SV.double(), logits_RV[other].double(), sampling.guidance)
    tokens_S = choose(
        logits_SV,
        masks_KV[[form.next(sample) for sample in samples]],
        sampling,
        torch.tensor([sample.number for sample in samples], device=device),
        torch.tensor([sample.length for sample in samples], device=device),
    )
    chosen = dict(zip((sample.number for sample in samples), tokens_S.tolist()))
    for sample in samples:
        form.add(sample, chosen[sample.number])
    for row in rows:
        row.feed = (chosen[row.sample.number],)
