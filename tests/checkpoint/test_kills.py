"""After kill -9 at seeded places in steps and saves, existing checkpoints stay and the run resumes bit for bit.

`make test` tries one place in most windows; `make test-long` tries several in each, in several layouts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.checkpoint.checkpoint import checkpoint_path, newest_complete, verify_checkpoint
from tests.support.killed_ranks import (
    EVERY,
    GROUPS,
    STEPS,
    WINDOWS,
    How,
    Kill,
    Undisturbed,
    run_ranks_of_train,
    same,
    stored,
    trace_of,
)
from tests.support.long import LONG

ALL_KILLS = [
    (how, window, seed)
    for how in (How(1, True), How(3, True), How(3, False))
    for window in WINDOWS
    for seed in (range(4) if window == "place" else range(2))
]
# A kill in `save` leaves what one in `write` leaves, one anywhere in a step what one in `optimizer` leaves.
FEW_KILLS = [(How(1, True), window, 0) for window in ("write", "tensors", "commit", "prune")]
FEW_KILLS += [(How(3, False), "optimizer", 0)]
FEW_KILLS += [(How(1, True), "place", 2), (How(3, False), "place", 0)]  # after a checkpoint became visible, and before
KILLS = ALL_KILLS if LONG else FEW_KILLS


def test_there_are_enough_kills():
    assert len(KILLS) >= (50 if LONG else 7)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "window", "seed"), KILLS, ids=str)
def test_a_killed_rank(how, window, seed, undisturbed, tmp_path):
    reference, run_dir = undisturbed(how), tmp_path / "run"
    kill = Kill.draw(seed, window, reference.counts)
    codes, printed = run_ranks_of_train(reference.overrides, run_dir, kill=kill)
    assert codes[kill.rank] == -9 and codes[1 - kill.rank] == 1, (kill, codes, printed)
    trace = trace_of(run_dir)
    print(f"rank {kill.rank} died in {' < '.join(trace.stack[:3])}")
    assert trace.inside, f"{kill} did not land where it was meant to: {trace.stack}"
    check_what_is_left(run_dir, reference, kill)
    codes, printed = run_ranks_of_train(reference.overrides, run_dir)
    assert codes == [0, 0], printed
    same(run_dir, reference.run_dir)


def check_what_is_left(run_dir: Path, undisturbed: Undisturbed, kill: Kill) -> None:
    """Check that all checkpoints are complete and equal the undisturbed run's, and the newest is the last saved."""
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    for name in left:
        if not name.endswith(".tmp"):
            verify_checkpoint(run_dir / "checkpoints" / name)
            assert stored(run_dir / "checkpoints" / name) == stored(undisturbed.run_dir / "checkpoints" / name)
    path = newest_complete(run_dir)
    newest = int(path.name.removeprefix("step_")) if path is not None else 0
    saving = EVERY * (kill.call + 1)  # the step that was being saved, if one was
    before = saving - EVERY
    name = checkpoint_path(run_dir, saving).name
    match kill.window:
        case "save":  # an asynchronous one begins with the end of the one before
            assert newest in ((max(before - EVERY, 0), before) if undisturbed.how.asynchronous else (before, saving))
        case "write":
            assert newest in (before, saving)
        case "tensors" | "index":  # begun, and not there yet
            assert newest == before and f"{name}.tmp" in left
        case "commit" | "place":  # under one name or the other
            assert newest in (before, saving) and (f"{name}.tmp" in left) == (newest == before)
        case "prune":
            assert newest == saving
        case window:
            if window in ("step", "metrics", "backward", "optimizer"):
                steps = kill.call // (1 if window in ("step", "metrics") else GROUPS // 2)  # done before
                due = steps // EVERY * EVERY  # it may still have been on its way
                assert newest in ((max(due - EVERY, 0), due) if undisturbed.how.asynchronous else (due,))
            assert newest <= STEPS - EVERY
