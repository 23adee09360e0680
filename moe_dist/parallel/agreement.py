"""Agreement between ranks: an error of one rank is raised on every rank, so that no rank hangs.

This module also contains functions that gather values from all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.core.errors import PeerError, UserError, as_user_error

PATIENCE = timedelta(days=2)


@contextmanager
def raise_on_all_ranks(*, patient: bool = False, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Context manager for a rank-local step of the set-up.

    If the step raises UserError on any rank, raise it on every rank. An exception of any other type is a bug in
    moe_dist. The rank with the bug raises that exception again, with the traceback; the other ranks raise PeerError.

    The end of the block is collective: every rank must reach it, and the body must not communicate.
    patient: if True, ranks that finish early wait up to PATIENCE (two days) for the others, instead of the usual
    timeout of a few minutes. The beginning of the block is then collective, too.
    group: a group of all ranks to use instead of the default group. A background thread needs its own group, because
    the main thread uses the default group at the same time.
    """
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    own = dist.new_group(backend="gloo", timeout=PATIENCE) if patient and not alone else None
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = as_user_error(error) or error
    if alone:
        if problem:
            raise problem
        return
    problems: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size()
    mine: tuple[type[Exception], str] | None = None
    if problem is not None:
        mine = (UserError, str(problem)) if isinstance(problem, UserError) else (PeerError, repr(problem))
    dist.all_gather_object(problems, mine, group=own or group)
    if own is not None:
        dist.destroy_process_group(own)
    if problem is not None and not isinstance(problem, UserError):
        raise problem  # a bug in moe_dist: its traceback is worth more than the sentence
    first = next(((rank, met) for rank, met in enumerate(problems) if met is not None), None)
    if first is not None:
        rank, (kind, text) = first
        raise kind(text if mine is not None else f"{text} (rank {rank})") from problem


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Gather a picklable value from every rank. Return the values in the order of the ranks.

    Collective over `group`, which must contain all ranks, or over the default group.
    """
    if not dist.is_initialized():
        return [value]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def largest(value: int, device: torch.device) -> int:
    """Return the largest value over all ranks. Collective."""
    if not dist.is_initialized():
        return value
    everyones = torch.tensor(value, device=device)
    dist.all_reduce(everyones, op=dist.ReduceOp.MAX)
    return int(everyones)
