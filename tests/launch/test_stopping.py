"""Stopping a run: real ranks get real signals at exact moments; resumed, the run is bitwise the undisturbed one."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from moe_dist.checkpoint.checkpoint import read_state
from moe_dist.metrics.run_folder import read_status
from moe_dist.parallel.discovery import free_port
from tests.launch.test_failing_runs import all_failed_with
from tests.launch.test_train import metrics_of, same_but_for_time, stored
from tests.support import ROOT
from tests.support.launching import DEEPSPEED, MOMA, bare_ranks, environment, launch, signals_at

STEP, SAVE, TOKENISE = "Run.train_step", "ShardWriter.write_data", "build_cache"


def status_of(run):
    status = read_status(run)
    return tuple(status[key] for key in ("state", "step", "reason", "restart"))


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def train(overrides, *rules):
    """Run training on two ranks with planted signals and check that both exit cleanly."""
    outcomes = bare_ranks(overrides, variables=signals_at(*rules))
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    assert not any("Traceback" in output for _, output in outcomes), outcomes


@pytest.mark.slow
def test_stopped_at_every_turn_and_still_bitwise_the_whole_run(overrides, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"

    train(overrides, f"1:SIGUSR1:{TOKENISE}:1")  # to one rank, during the set-up of a new run
    assert status_of(run) == ("stopped", 0, "SIGUSR1", True)
    assert sorted(path.name for path in run.iterdir()) == ["health.json", "status.json"]

    train(overrides, f"1:SIGUSR2:{STEP}:2")  # to one rank, in a step: the run stops before the next periodic checkpoint
    assert (status_of(run), checkpoints(run)) == (("stopped", 2, "SIGUSR2", True), ["step_00000002"])

    # To rank 1 in a step, to rank 0 in the evaluation after it and in the save: the checkpoint at step 4 is the last.
    train(overrides, f"1:SIGUSR1:{STEP}:2", "0:SIGTERM:evaluate:1", "0:SIGTERM:Run.save:1")
    assert (status_of(run), checkpoints(run)) == (("stopped", 4, "SIGTERM", True), ["step_00000002", "step_00000004"])

    # Not asynchronous, or the save could run during the next step.
    every = [*overrides, "checkpoint.every=1", "checkpoint.keep=9", "checkpoint.asynchronous=false"]
    train(every, f"1:SIGTERM:{SAVE}:1")  # to one rank, while it writes: that checkpoint is the last one, and complete
    assert status_of(run) == ("stopped", 5, "SIGTERM", True)
    assert checkpoints(run)[-1] == "step_00000005"

    launched = launch(DEEPSPEED, overrides, variables=signals_at(f"0:SIGTERM:{STEP}:1:launcher"))
    assert status_of(run) == ("stopped", 6, "SIGTERM", True), launched.stdout + launched.stderr
    assert "Traceback" not in launched.stdout + launched.stderr

    train(overrides)
    train([*overrides, f"run.dir={whole}"])
    assert status_of(run) == status_of(whole) == ("done", 8, None, False)
    assert same_but_for_time(metrics_of(run)) == same_but_for_time(metrics_of(whole))
    last = "checkpoints/step_00000008"
    assert stored(run / last) == stored(whole / last)
    for key in ("step", "tokens", "loader"):
        assert read_state(run / last)[key] == read_state(whole / last)[key]


@pytest.mark.slow
def test_failures_that_starting_again_can_help_and_those_it_cannot(overrides, tmp_path):
    """A rank is killed in a step. Then a user starts a wrong recipe in the folder of that good run."""
    overrides = [*overrides, "checkpoint.every=1", "eval.every=0"]
    outcomes = bare_ranks(overrides, variables=signals_at(f"1:SIGKILL:{STEP}:3"))
    assert [status for status, _ in outcomes] == [1, -9], outcomes
    state, step, reason, restart = status_of(tmp_path / "run")
    assert (state, step, restart) == ("failed", 2, True) and reason

    all_failed_with(bare_ranks([*overrides, "seed=5"]), "seed was")
    state, step, reason, restart = status_of(tmp_path / "run")
    assert (state, step, restart) == ("failed", 2, False) and "seed was" in reason


@pytest.mark.slow
def test_a_signal_ends_a_rank_whose_peers_never_come(overrides, tmp_path):
    meeting = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    waits = f"waiting for 1 of 2 ranks at 127.0.0.1:{(port := free_port())} (missing: 1)\n"
    rank = subprocess.Popen(
        [sys.executable, "launch/train.py", "--config", MOMA, *overrides],
        cwd=ROOT,
        env=environment() | meeting | {"MASTER_PORT": str(port)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        printed = ""
        while waits not in printed:
            line = rank.stdout.readline()
            assert line, printed
            printed += line
        rank.send_signal(signal.SIGTERM)
        printed = rank.communicate(timeout=120)[0]
    finally:
        rank.kill()
    assert rank.returncode == 0 and f"stopped (SIGTERM) before the first step: {tmp_path / 'run'}" in printed
    assert status_of(tmp_path / "run") == ("stopped", 0, "SIGTERM", True)
