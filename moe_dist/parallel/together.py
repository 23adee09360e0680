"""What one rank runs into, every rank hears of: an error on one becomes the same error on all, without a hang."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from moe_dist.errors import UserError


@contextmanager
def together() -> Iterator[None]:
    """Run a rank-local step of the set-up; when it fails on any rank, raise that rank's UserError on every rank.

    Collective at its end: every rank must pass through it, and the body must not communicate.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if problem:
            raise problem
        return
    sentences: list[str | None] = [None] * dist.get_world_size()
    mine = None if problem is None else str(problem) if isinstance(problem, UserError) else repr(problem)
    dist.all_gather_object(sentences, mine)
    if problem is not None and not isinstance(problem, UserError):
        raise problem  # a defect of ours: its traceback is worth more than the sentence
    first = next(((rank, text) for rank, text in enumerate(sentences) if text is not None), None)
    if first is not None:
        rank, text = first
        raise UserError(text if mine is not None else f"{text} (rank {rank})") from problem
