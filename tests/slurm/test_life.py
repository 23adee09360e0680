"""Interruptions of a long job: after any of them, the finished run is bitwise the undisturbed one."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from moe_dist.metrics.run_folder import read_status

pytestmark = pytest.mark.slow


def ranks_on(node: str, run: Path) -> list[int]:
    """Return the process ids of a run's ranks on a node."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        is_rank = b"launch/train.py" in command.split(b"\0") and f"run.dir={run}".encode() in command.split(b"\0")
        if is_rank and f"SLURMD_NODENAME={node}".encode() in environment.split(b"\0"):
            found.append(int(process.name))
    return found


def starts(log: str) -> list[int]:
    """Return the step after which each start of the job continued."""
    return [int(step) for step in re.findall(r"^start \d+ of job \S+: continues after step (\d+)$", log, re.MULTILINE)]


def newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step_*") if path.name[5:].isdecimal()), default=0)


def test_notice_kill_and_a_lost_node(slurm, tiny, undisturbed, tmp_path):
    """With one task per rank: notice before the time limit, then kill -9 of a node's ranks, then loss of a node."""
    job, run = slurm.sbatch("pretrain_moma.sh", *tiny), tmp_path / "run"
    slurm.until(lambda: slurm.steps(run) >= 2, job)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@120 does before the time limit
    slurm.until(lambda: read_status(run)["state"] == "stopped", job)
    stopped = read_status(run)["step"]

    slurm.until(lambda: slurm.steps(run) >= max(6, stopped + 2) and ranks_on("127.0.1.2", run), job)
    saved = [newest(run)]
    for process in ranks_on("127.0.1.2", run):
        os.kill(process, signal.SIGKILL)
    slurm.until(lambda: len(starts(slurm.log(job))) == 3, job)
    saved.append(newest(run))

    slurm.until(lambda: slurm.steps(run) >= saved[-1] + 3, job)
    before = newest(run)
    slurm.devcluster("kill-node", "2")
    slurm.until(lambda: slurm.show(job)["Restarts"] == "3", job)
    after = newest(run)
    slurm.devcluster("up", "2")
    slurm.ended(job)
    first, second, third, fourth = starts(slurm.log(job))
    assert (first, second) == (0, stopped)
    assert saved[0] <= third == saved[1] and before <= fourth == after, "no step before the last checkpoint is lost"
    undisturbed.equals(run)
    assert slurm.log(job).count("asks Slurm to start it again") >= 2


def test_requeue_and_preemption_under_the_deepspeed_launcher(slurm, tiny, undisturbed, tmp_path):
    """With one task per node, Slurm sends TERM both for a requeue and for a preemption. The ranks save a checkpoint."""
    job, run = slurm.sbatch("pretrain_moma.sh", *tiny, options=("-pmain",), START="deepspeed"), tmp_path / "run"
    slurm.until(lambda: slurm.steps(run) >= 2, job)
    slurm.run("scontrol", "requeue", job)
    slurm.until(lambda: read_status(run)["state"] == "stopped", job)
    stopped = read_status(run)["step"]

    slurm.until(lambda: slurm.steps(run) >= stopped + 2, job)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    other = slurm.sbatch(urgent, options=("-purgent", "-N2", "--exclusive", "--output=/dev/null"))
    slurm.ended(other)
    slurm.ended(job)
    assert slurm.show(job)["Restarts"] == "2"
    first, second, third = starts(slurm.log(job))
    assert (first, second) == (0, stopped) and third > stopped
    undisturbed.equals(run)


def test_a_chain_of_jobs_that_may_not_be_requeued(slurm, tiny, undisturbed, tmp_path):
    """An array runs one task at a time, and a singleton job after it: the first is stopped, the second finishes."""
    run = tmp_path / "run"
    array = slurm.sbatch("pretrain_moma.sh", *tiny, options=("--no-requeue", "--array=1-2%1"))
    last = slurm.sbatch("pretrain_moma.sh", *tiny, options=("--no-requeue", "--dependency=singleton"))
    slurm.until(lambda: slurm.steps(run) >= 2, f"{array}_1")
    slurm.run("scancel", "--batch", "--signal=USR1", f"{array}_1")
    slurm.ended(last)
    shown = [slurm.ended(job) for job in (f"{array}_1", f"{array}_2")]
    logs = [slurm.log(each["JobId"]) for each in shown]
    assert "the next job goes on from the last checkpoint" in logs[0]
    assert "done after 20 of 20 steps" in logs[1] and starts(logs[1]) == [read_step(logs[0])]
    assert slurm.log(last) == f"{run} is done: nothing is left to train\n"
    undisturbed.equals(run)


def read_step(log: str) -> int:
    return int(re.search(r"^stopped after (\d+) steps: SIGUSR1$", log, re.MULTILINE)[1])


def test_a_crash_loop_ends(slurm, tiny, planted):
    """If the ranks die at every start, the job ends after two starts, as the site's settings allow."""
    job = slurm.sbatch("pretrain_moma.sh", *tiny, **planted("crash", "MAX_FAILURES=2"))
    shown = slurm.ended(job, "FAILED")
    assert (shown["ExitCode"], shown["Restarts"]) == ("1:0", "1")
    log = slurm.log(job)
    assert "failure 1 of 2 without a newer checkpoint" in log and "given up after 2 failures" in log


def test_a_hang_ends_and_the_run_goes_on(slurm, tiny, planted, undisturbed, tmp_path):
    run = tmp_path / "run"
    job = slurm.sbatch("pretrain_moma.sh", *tiny, "health.hang_seconds=8", **planted("hang once"))
    slurm.ended(job)
    log = slurm.log(job)
    assert "failed after 2 steps: no progress for 8 seconds (health.hang_seconds); the stacks are in " in log
    stacks = [(run / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "in planted_hang" in stacks[1] and "in planted_hang" not in stacks[0]
    assert "distributed_c10d.py" in stacks[0], "it waits for the other"
    undisturbed.equals(run)


def test_a_cancelled_job_stays_cancelled(slurm, tiny, tmp_path):
    """scancel ends the ranks with a checkpoint, as preemption does, but the job does not start again."""
    run = tmp_path / "run"
    job = slurm.sbatch("pretrain_moma.sh", *tiny)
    slurm.until(lambda: slurm.steps(run) >= 2, job)
    slurm.run("scancel", job)
    slurm.until(lambda: not slurm.run("squeue", "--noheader"), job)
    assert slurm.ended(job, "CANCELLED")["Restarts"] == "0"
    assert read_status(run)["state"] == "stopped" and newest(run) == read_status(run)["step"]
