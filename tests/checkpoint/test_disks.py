"""Checkpoints on disks that are really full or read-only: every rank has the same sentence, and nothing is lost."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.checkpoint import checkpoint_path
from moe_dist.core.errors import UserError
from tests.support.checkpoint_jobs import Job, build
from tests.support.disks import Disk, read_only, restricted, small_disk
from tests.support.distributed import run_ranks
from tests.support.permissions import public_folder
from tests.support.toy_model import objective, step_batches

PAGE = 4096  # what a tmpfs gives at a time


def _save_with_little_room(rank: int, job: Job, disk: Disk, rooms: list[int]) -> list[str]:
    """Save one checkpoint, then try a second with each amount of room, at last enough. Return the error sentences."""
    engine, layout = build(job)
    engine.train_step(step_batches(0, rank, job.world, groups=4), objective, 0.01)
    first, second = (checkpoint_path(disk.folder, step) for step in (1, 2))
    checkpoint.save(first, engine, layout, state={})
    sentences = []
    for room in rooms:
        if layout.is_main:
            disk.fill(room)
        dist.barrier()
        with disk.limit(room), pytest.raises(UserError) as caught:
            checkpoint.save(second, engine, layout, state={})
        sentences.append(str(caught.value).removesuffix(" (rank 0)"))
        dist.barrier()
        if layout.is_main:
            disk.empty()
            left = sorted(first.parent.iterdir())
            assert left == [first.parent / "frozen", first], "what there is of the second one is gone"
            checkpoint.verify_checkpoint(first)
        dist.barrier()
    checkpoint.save(second, engine, layout, state={})
    return sentences


def test_a_full_disk(saved, tmp_path):
    """The disk becomes full at a seeded place within every file, in the order in which files are written."""
    job, _ = saved
    files = ["rank_00000.safetensors", "rank_00001.safetensors", "index.json", "state.json", "manifest.json"]
    pages = [-(-(Path(job.save) / file).stat().st_size // PAGE) for file in files]
    chance = random.Random(0)
    rooms = [(sum(pages[:number]) + chance.randrange(pages[number])) * PAGE for number in range(len(files))]
    with small_disk(tmp_path / "disk", 4 * 2**20) as disk:
        told = run_ranks(_save_with_little_room, 2, replace(job, save=None), disk, rooms)
        assert told[0] == told[1]
        reason = "[Errno 28] No space left on device" if disk.mounted else "[Errno 27] File too large"
        for sentence in told[0]:
            assert f"cannot write the checkpoint {checkpoint_path(disk.folder, 2)}: {reason}" in sentence
        for step in (1, 2):
            checkpoint.verify_checkpoint(checkpoint_path(disk.folder, step))


def _save_read_only(rank: int, job: Job, disk: Disk) -> str:
    """Load the existing checkpoint, and fail to save another."""
    engine, layout = build(job)
    checkpoint.load(job.load, engine, layout)
    with restricted(disk), pytest.raises(UserError) as caught:
        checkpoint.save(checkpoint_path(disk.folder.parent, 3), engine, layout, state={})
    return str(caught.value)


def test_a_read_only_disk(saved):
    """A checkpoint on a read-only disk can be loaded, but none can be saved."""
    job, _ = saved
    with public_folder() as run_dir:
        folder = run_dir / "checkpoints"
        shutil.copytree(Path(job.save).parent, folder)
        path = checkpoint_path(run_dir, 2)
        with read_only(folder) as disk:
            told = run_ranks(_save_read_only, 2, job.resumed(load=str(path)), disk)
        reason = "[Errno 30] Read-only file system" if disk.mounted else "[Errno 13] Permission denied"
        for sentence in told:
            assert f"cannot write the checkpoint {checkpoint_path(run_dir, 3)}: {reason}" in sentence
        assert sorted(folder.iterdir()) == [folder / "frozen", path]
        checkpoint.verify_checkpoint(path)
