"""A process that does not move ends with status 1 and leaves its stacks; one that does, or is done, is left alone."""

import subprocess
import sys

import pytest

from tests.support import ROOT

PROGRAM = """
import sys, threading, time
from pathlib import Path
from moe_dist.health import hang
hang.GRACE = 0.5
folder, rank, seconds, moves = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
def stuck_in_the_mud():
    time.sleep(60)
with hang.HangWatch(folder / "stacks", rank, seconds, lambda sentence: (folder / "told").write_text(sentence)) as watch:
    for _ in range(moves):
        time.sleep(seconds / 4)
        watch.beat()
    if len(sys.argv) > 5:
        stuck_in_the_mud()
print("out", flush=True)
time.sleep(float(seconds) * 2 if moves else 0)
print("end", flush=True)
"""


def run(folder, rank, seconds, moves, *stuck):
    arguments = [str(folder), str(rank), str(seconds), str(moves), *stuck]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=50
    )


def test_a_hang_is_told_by_rank_0_and_shows_its_stack(tmp_path):
    for rank in (0, 1):
        done = run(tmp_path, rank, 1.0, 1, "stuck")
        assert done.returncode == 1
        assert "no progress for 1 seconds" in done.stderr
        assert "in stuck_in_the_mud" in (tmp_path / "stacks" / f"rank-{rank}.txt").read_text()
        assert ((tmp_path / "told").exists(), rank) in ((True, 0), (False, 1))
        (tmp_path / "told").unlink(missing_ok=True)


@pytest.mark.slow
def test_a_run_that_moves_is_left_alone_and_leaves_nothing(tmp_path):
    """Eight beats a quarter of the time apart: twice the time in all; and as long again after the end."""
    done = run(tmp_path, 0, 1.0, 8)
    assert (done.returncode, done.stdout) == (0, "out\nend\n"), done.stderr
    assert not list((tmp_path / "stacks").iterdir()) and not (tmp_path / "told").exists()


def test_zero_is_never(tmp_path):
    done = run(tmp_path, 0, 0.0, 0)
    assert (done.returncode, done.stdout) == (0, "out\nend\n")
    assert not (tmp_path / "stacks").exists()
