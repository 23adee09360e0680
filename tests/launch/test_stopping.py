"""A run that is told to stop: real ranks meet real signals at exact moments; resumed, it is bitwise the whole run."""

from __future__ import annotations

import pytest

from moe_dist.checkpoint.checkpoint import read_state
from moe_dist.metrics.run_folder import read_status
from tests.launch.test_failing_runs import all_failed_with
from tests.launch.test_train import metrics_of, same_but_for_time, stored
from tests.support.launching import DEEPSPEED, bare_ranks, launch, signals_at

STEP, SAVE, TOKENISE = "Run.train_step", "ShardWriter.write_data", "build_cache"


def status_of(run):
    status = read_status(run)
    return tuple(status[key] for key in ("state", "step", "reason", "restart"))


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def train(overrides, *rules):
    """Both ranks end well, whatever signals they meet."""
    outcomes = bare_ranks(overrides, variables=signals_at(*rules))
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    assert not any("Traceback" in output for _, output in outcomes), outcomes


@pytest.mark.slow
def test_stopped_at_every_turn_and_still_bitwise_the_whole_run(overrides, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"

    train(overrides, f"1:SIGUSR1:{TOKENISE}:1")  # one rank, in the set-up of a new run
    assert status_of(run) == ("stopped", 0, "SIGUSR1", True)
    assert sorted(path.name for path in run.iterdir()) == ["health.json", "status.json"]

    train(overrides, f"1:SIGUSR2:{STEP}:2")  # one rank, in a step: it ends before the checkpoint that was due
    assert (status_of(run), checkpoints(run)) == (("stopped", 2, "SIGUSR2", True), ["step_00000002"])

    # Rank 1 in a step, rank 0 in the evaluation after it, twice: the checkpoint due at step 4 is the last one.
    train(overrides, f"1:SIGUSR1:{STEP}:2", "0:SIGTERM:evaluate:1", "0:SIGTERM:Run.save:1")
    assert (status_of(run), checkpoints(run)) == (("stopped", 4, "SIGTERM", True), ["step_00000002", "step_00000004"])

    # In the background it may be written during the next step already.
    every = [*overrides, "checkpoint.every=1", "checkpoint.keep=9", "checkpoint.asynchronous=false"]
    train(every, f"1:SIGTERM:{SAVE}:1")  # one rank, while it writes: that save is the last, and whole
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
    """A rank killed in a step; then, by hand, a wrong recipe in the folder of that good run."""
    overrides = [*overrides, "checkpoint.every=1", "eval.every=0"]
    outcomes = bare_ranks(overrides, variables=signals_at(f"1:SIGKILL:{STEP}:3"))
    assert [status for status, _ in outcomes] == [1, -9], outcomes
    state, step, reason, restart = status_of(tmp_path / "run")
    assert (state, step, restart) == ("failed", 2, True) and reason

    all_failed_with(bare_ranks([*overrides, "seed=5"]), "seed was")
    state, step, reason, restart = status_of(tmp_path / "run")
    assert (state, step, restart) == ("failed", 2, False) and "seed was" in reason
