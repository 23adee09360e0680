"""Verification of checkpoints in one process, without building their models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_dist.checkpoint.manifest import checkpoints, verify_checkpoint
from moe_dist.checkpoint.storage import read_index
from moe_dist.core.errors import UserError


def inspect(folder: str | Path, tell: Callable[[str], None]) -> None:
    """Verify every byte of a checkpoint, or of all checkpoints of a run, including their frozen weights.

    tell: called with one line about each checkpoint. If checkpoints are damaged, the remaining ones are still verified.
    Then the UserError of the first damaged one is raised.
    """
    problems = []
    known: set[str] = set()  # files of the frozen store, which several checkpoints share
    for path in checkpoints(folder) or [Path(folder)]:
        try:
            files = verify_checkpoint(path, known=known)
            tensors = read_index(path, files).state_dict_metadata
        except UserError as error:
            problems.append(error)
            tell(f"{path}: NOT usable: {error}")
        else:
            known |= {name for name in files if "/" in name}
            mib, shared = (sum(files[name] for name in part) / 2**20 for part in (files, known & files.keys()))
            of_which = f" ({shared:,.1f} of them frozen weights)" if shared else ""
            tell(f"{path}: {len(files)} files, {len(tensors):,} tensors, {mib:,.1f} MiB{of_which}: all as written")
    if problems:
        raise problems[0]
