"""kill -9 of one rank under the launchers: the run ends within a bounded time, no rank is left, and it resumes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from moe_dist.telemetry.run_folder import read_status
from tests.launching import DEEPSPEED, MPIEXEC, TORCHRUN, start

BOUND = 120.0  # seconds; far below the half hour after which a collective gives up by itself


def ranks_of(run_dir: Path) -> dict[int, int]:
    """Process ids of a run's ranks, by rank, from their environments."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
            variables = dict(line.split("=", 1) for line in (folder / "environ").read_text().split("\0") if "=" in line)
        except (OSError, UnicodeDecodeError):
            continue
        rank = variables.get("RANK") or variables.get("PMI_RANK")
        if f"run.dir={run_dir}" in command and rank is not None and "python" in command[0]:
            found[int(rank)] = int(folder.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [DEEPSPEED, TORCHRUN, MPIEXEC], ids=["deepspeed", "torchrun", "mpiexec"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_launcher_ends_the_others(victim, launcher, overrides, tmp_path):
    run_dir = tmp_path / "run"
    overrides = [*overrides, "train.steps=2000", "checkpoint.every=2", "eval.every=0", "telemetry.tensorboard=false"]
    process = start(launcher, overrides)
    metrics = run_dir / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    ranks = ranks_of(run_dir)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[victim], signal.SIGKILL)
    began = time.monotonic()
    try:
        output, _ = process.communicate(timeout=BOUND)
    finally:
        process.kill()
    print(process.returncode, time.monotonic() - began, output[-3000:], read_status(run_dir))
    assert process.returncode != 0, output
    assert not ranks_of(run_dir)
