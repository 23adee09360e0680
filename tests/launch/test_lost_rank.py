"""kill -9 of one rank under a launcher: the run ends within a bounded time and leaves no rank running.

tests/checkpoint/test_kills.py tests ranks without a launcher.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from moe_dist.checkpoint.checkpoint import newest_complete, verify_checkpoint
from moe_dist.parallel.discovery import free_port
from tests.support.launching import DEEPSPEED, MPIEXEC, TORCHRUN, start
from tests.support.long import LONG

BOUND = 120.0  # seconds; far below the 30-minute timeout of a collective


def ranks_of(run_dir: Path) -> dict[int, int]:
    """Return the process ids of a run's ranks, by rank, found by the environment that a launcher gave them."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            pairs = [pair.partition("=") for pair in (process / "environ").read_bytes().decode().split("\0")]
        except (OSError, UnicodeDecodeError):
            continue
        variables = {key: value for key, _, value in pairs}
        rank = variables.get("RANK") or variables.get("PMI_RANK")
        if f"run.dir={run_dir}" in words and rank is not None:
            found[int(rank)] = int(process.name)
    return found


LAUNCHERS = {"deepspeed": DEEPSPEED, "torchrun": TORCHRUN, "mpiexec": MPIEXEC}
ALL = [(name, victim) for name in LAUNCHERS for victim in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "victim"), ALL if LONG else [("deepspeed", 1), ("torchrun", 0)])
def test_a_launcher_ends_the_others(name, victim, overrides, tmp_path):
    run_dir = tmp_path / "run"
    overrides = [*overrides, "train.steps=2000", "checkpoint.every=2", "eval.every=0", "telemetry.tensorboard=false"]
    launcher = LAUNCHERS[name]
    process = start([*launcher, str(free_port())] if launcher is DEEPSPEED else launcher, overrides)
    try:
        deadline = time.monotonic() + 2 * BOUND
        while newest_complete(run_dir) is None:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks = ranks_of(run_dir)
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[victim], signal.SIGKILL)
        output, _ = process.communicate(timeout=BOUND)
    finally:
        process.kill()
    assert process.returncode != 0, output
    assert not ranks_of(run_dir)
    newest = newest_complete(run_dir)
    assert newest is not None
    verify_checkpoint(newest)
