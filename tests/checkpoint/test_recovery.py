"""If a disk fails or a checkpoint is damaged, a run says what to do, and doing it gives the same bits."""

from __future__ import annotations

import shutil

import pytest

from moe_dist.checkpoint.checkpoint import checkpoint_path, newest_complete, verify_checkpoint
from moe_dist.metrics.run_folder import read_status
from tests.support.disks import small_disk
from tests.support.killed_ranks import EVERY, How, run_ranks_of_train, same

HOW = How(stage=1, asynchronous=True)


def the_error(codes: list[int], printed: list[str]) -> str:
    """Return the error of a failed run: one sentence, on rank 0."""
    assert codes == [2, 2], printed
    (error,) = [line for output in printed for line in output.splitlines() if line.startswith("error: ")]
    return error


@pytest.mark.slow
def test_a_disk_that_becomes_full(undisturbed, tmp_path):
    """The disk has room for one and a half checkpoints, or for no checkpoint file if nothing can be mounted."""
    reference = undisturbed(HOW)
    first = checkpoint_path(reference.run_dir, EVERY)
    size = sum(file.stat().st_size for file in first.iterdir())
    with small_disk(tmp_path / "disk", 3 * size // 2 + 2**16) as disk:
        run_dir = disk.folder / "run"
        codes, printed = run_ranks_of_train(
            reference.overrides, run_dir, largest_file=None if disk.mounted else size // 10
        )
        failed = checkpoint_path(run_dir, 2 * EVERY if disk.mounted else EVERY)
        reason = "[Errno 28] No space left on device" if disk.mounted else "[Errno 27] File too large"
        assert f"cannot write the checkpoint {failed}: {reason}" in the_error(codes, printed)
        assert read_status(run_dir)["state"] == "failed"
        assert newest_complete(run_dir) == (checkpoint_path(run_dir, EVERY) if disk.mounted else None)
        for path in (run_dir / "checkpoints").iterdir():
            verify_checkpoint(path)
        disk.grow()
        codes, printed = run_ranks_of_train(reference.overrides, run_dir)
        assert codes == [0, 0], printed
        same(run_dir, reference.run_dir)


@pytest.fixture
def interrupted(undisturbed, tmp_path):
    """Return an unfinished run with checkpoints of steps 2 and 4, its overrides, and the undisturbed run's folder."""
    reference, run_dir = undisturbed(HOW), tmp_path / "run"
    shutil.copytree(reference.run_dir, run_dir)
    newest = newest_complete(run_dir)
    assert newest is not None
    shutil.rmtree(newest)
    return run_dir, reference.overrides, reference.run_dir


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_that_is_moved_away(interrupted, tmp_path):
    run_dir, overrides, reference = interrupted
    damaged = checkpoint_path(run_dir, 2 * EVERY)
    file = damaged / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    error = the_error(*run_ranks_of_train(overrides, run_dir))
    assert f"{file} is damaged: " in error and f"move {damaged} away to continue from the checkpoint before it" in error
    damaged.rename(tmp_path / "away")
    codes, printed = run_ranks_of_train(overrides, run_dir)
    assert codes == [0, 0], printed
    same(run_dir, reference)


@pytest.mark.slow
def test_a_checkpoint_without_a_shard_that_is_not_used(interrupted):
    """Told to resume from the one before, the run sets the later one aside, which would else be resumed from next."""
    run_dir, overrides, reference = interrupted
    before, damaged = (checkpoint_path(run_dir, step) for step in (EVERY, 2 * EVERY))
    (damaged / "rank_00000.safetensors").unlink()
    assert "rank_00000.safetensors is missing; restore it, or " in the_error(*run_ranks_of_train(overrides, run_dir))
    codes, printed = run_ranks_of_train([*overrides, f"run.resume={before}"], run_dir)
    assert codes == [0, 0], printed
    assert f"set aside: {damaged} is of a later step than {EVERY}" in printed[0]
    assert damaged.with_suffix(".aside").is_dir()
    same(run_dir, reference)
