"""Functions that write fragments to a new folder. If a disk or a DCP call fails, all ranks raise the same error."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from moe_dist.checkpoint.storage import Fragment, FragmentSavePlanner, ShardWriter
from moe_dist.core.errors import UserError
from moe_dist.core.files import StoredFile
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.layout import Layout


def write_fragments(
    folder: Path, held: list[Fragment], layout: Layout, group: dist.ProcessGroup | None, what: str
) -> set[StoredFile]:
    """Write this rank's fragments to a folder, and an index of all ranks' fragments. Collective over `group`.

    An existing folder is replaced. what: the start of the error message. Returns the written files on rank 0, and an
    empty set on all other ranks. If a disk fails, raises the same UserError on every rank.
    """
    writer = ShardWriter(folder)
    with disk_errors(what, group):
        if layout.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
    with dcp_errors(what):
        dcp.save({}, storage_writer=writer, planner=FragmentSavePlanner(held), process_group=group)
    return writer.files


@contextmanager
def removed_on_error(folder: Path, layout: Layout) -> Iterator[None]:
    """Context manager that removes an unfinished folder if the block raises UserError.

    Rank 0 removes the folder. If the block raises UserError on one rank, it must do so on every rank.
    """
    try:
        yield
    except UserError:
        if layout.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def disk_errors(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Context manager for disk operations. If any rank raises OSError in the block, all ranks raise UserError.

    Collective: the ranks exchange their errors at the end of the block. what: the start of the error message.
    """
    with raise_on_all_ranks(group=group):
        try:
            yield
        except OSError as error:
            raise UserError(f"{what}: {error}") from error


@contextmanager
def dcp_errors(what: str) -> Iterator[None]:
    """Context manager that replaces the CheckpointException of torch.distributed.checkpoint (DCP).

    If the disk caused the exception, UserError is raised instead. Otherwise, RuntimeError is raised. DCP raises its
    exception on every rank, so every rank raises the same error. what: the start of the UserError's message.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        if isinstance(cause, OSError | UserError):
            raise UserError(f"{what}: {cause} (rank {rank})") from None
        raise RuntimeError(str(error)) from None
