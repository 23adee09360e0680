"""What one rank runs into, every rank hears of: an error on one becomes the same error on all, without a hang."""

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
    """Run a rank-local step of the set-up; when it fails on any rank, raise that rank's UserError on every rank.

    A defect of ours keeps its type on the rank that met it and is a PeerError on the others.

    Collective at its end: every rank must pass through it, and the body must not communicate. patient: ranks that are
    done wait for the others for PATIENCE, not just the minutes after which other collectives give up (collective at its
    beginning, too). group: another one of all ranks, for a thread that must not get between the default group's.
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
        raise problem  # a defect of ours: its traceback is worth more than the sentence
    first = next(((rank, met) for rank, met in enumerate(problems) if met is not None), None)
    if first is not None:
        rank, (kind, text) = first
        raise kind(text if mine is not None else f"{text} (rank {rank})") from problem


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's picklable value, by rank. Collective, over `group` of all ranks where one is given."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def largest(value: int, device: torch.device) -> int:
    """The largest of every rank's values. Collective."""
    if not dist.is_initialized():
        return value
    everyones = torch.tensor(value, device=device)
    dist.all_reduce(everyones, op=dist.ReduceOp.MAX)
    return int(everyones)
