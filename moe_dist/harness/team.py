"""Requests that all ranks answer together. Rank 0 sends them one by one until its work is done.

Only rank 0 needs the tasks and their data. The other ranks could not build the requests by themselves: a task may
depend on Python's hashes, which differ between processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from moe_dist.harness.answering import AnsweringModel
from moe_dist.parallel.agreement import PATIENCE, raise_on_all_ranks

Outcome = TypeVar("Outcome")
Job = tuple[str, tuple[Any, ...]]  # the name of a method of AnsweringModel, and its arguments


class Team:
    """The ranks that answer requests together.

    Rank 0 sends the requests. The other ranks wait for each request, but at most PATIENCE.
    """

    def __init__(self, model: AnsweringModel) -> None:
        self._model = model
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._group = None if alone else dist.new_group(backend="gloo", timeout=PATIENCE)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of AnsweringModel on all ranks and return rank 0's result. For rank 0 only."""
        self._share((method, arguments))
        return getattr(self._model, method)(*arguments)

    def lead(self, work: Callable[[], Outcome]) -> Outcome | None:
        """Run `work` on rank 0. Each time it calls `ask`, the other ranks make the same call. Collective.

        Returns the result on rank 0 and None on the others. An exception of rank 0 is raised on every rank.
        """
        problem: Exception | None = None
        result: Outcome | None = None
        if self._model.layout.is_main:
            try:
                result = work()
            except Exception as error:
                problem = error
            self._share(None)
        else:
            self._follow()
        if self._group is not None:
            dist.destroy_process_group(self._group)
        with raise_on_all_ranks():
            if problem is not None:
                raise problem
        return result

    def _follow(self) -> None:
        while (job := self._share(None)) is not None:
            method, arguments = job
            getattr(self._model, method)(*arguments)

    def _share(self, job: Job | None) -> Job | None:
        """Send rank 0's job to the other ranks and return it on every rank. The job None ends their work."""
        if self._group is None:
            return job
        shared = [job]
        dist.broadcast_object_list(shared, src=0, group=self._group)
        return shared[0]
