"""The verdict on an attempt: what its run folder holds, and what the one before has left."""

import json

import pytest

from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from moe_dist.health.job_attempts import begin, end
from moe_dist.metrics.run_folder import RunFolder
from tests.support.launching import MOMA


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def start(folder, restarts=0, job="7", resume="auto"):
    return begin(load_config(MOMA, [f"run.dir={folder.path}", f"run.resume={resume}"]), job, restarts, 2)


def checkpoint(folder, step):
    (folder.checkpoints / f"step_{step:08d}").mkdir(parents=True)


def test_a_run_that_is_done_does_not_start_again(folder):
    assert start(folder).step == 0
    checkpoint(folder, 8)
    folder.write_status("done", 8, restart=False)
    ending = end(folder.path, 0, 2)
    assert (ending.verdict, ending.sentence) == ("done", "done after 8 steps")
    assert start(folder, job="8") is None, "the next link of a chain"
    assert start(folder, 1) is None
    assert start(folder, resume="none").step == 0, "a person wants it anew"


@pytest.mark.parametrize(
    ("state", "reason", "restart", "verdict"),
    [
        ("stopped", "SIGUSR1", True, "again"),
        ("stopped", "train.stop_after", False, "stopped"),
        ("failed", "unknown key 'x'", False, "wrong"),
        ("failed", "Connection closed by peer", True, "again"),
        ("running", None, True, "again"),
    ],
)
def test_how_it_ended(state, reason, restart, verdict, folder):
    start(folder)
    folder.write_status(state, 3, reason, restart=restart)
    ending = end(folder.path, 1, 2)
    assert ending.verdict == verdict
    assert (reason or "exited without writing a status") in ending.sentence


@pytest.mark.parametrize(("code", "verdict"), [(2, "wrong"), (1, "again"), (0, "again"), (137, "again")])
def test_the_launcher_speaks_where_the_run_is_silent(code, verdict, folder):
    """The status that lies there is an earlier attempt's: a launcher that dies before torch is loaded writes none."""
    folder.write_status("failed", 3, "of yesterday", restart=code != 2)
    start(folder)
    ending = end(folder.path, code, 2)
    assert ending.verdict == verdict and "of yesterday" not in ending.sentence


def test_failures_without_a_newer_checkpoint_are_counted_over_starts(folder):
    def fail(step=3):
        folder.write_status("failed", step, "RuntimeError", restart=True)
        return end(folder.path, 1, 2)

    start(folder)
    assert "failure 1 of 2 without a newer checkpoint" in fail().sentence
    start(folder, 1)
    checkpoint(folder, 4)
    assert fail(5).verdict == "again", "it came further"
    assert start(folder, 2).step == 4
    assert fail().verdict == "again"
    start(folder, 3)
    ending = fail()
    assert ending.verdict == "given up" and "given up after 2 failures" in ending.sentence


def test_a_stop_in_between_takes_no_blame(folder):
    start(folder)
    folder.write_status("failed", 3, "RuntimeError", restart=True)
    end(folder.path, 1, 2)
    start(folder, 1)
    folder.write_status("stopped", 3, "SIGTERM", restart=True)
    assert end(folder.path, 0, 2).failures == 0


def test_attempts_that_died_with_their_node_are_judged_by_the_next(folder):
    start(folder)
    folder.write_status("running", 1, restart=True)
    start(folder, 1)
    folder.write_status("running", 1, restart=True)
    with pytest.raises(UserError, match="given up after 2 failures"):
        start(folder, 2)
    assert start(folder, 0, job="8").step == 0, "a person tries again"


def test_a_preempted_attempt_goes_on(folder):
    start(folder)
    checkpoint(folder, 3)
    folder.write_status("stopped", 3, "SIGTERM", restart=True)
    assert start(folder, 1).step == 3


def test_starting_afresh_happens_once(folder, tmp_path):
    checkpoint(folder, 40)
    assert start(folder, resume="none").overrides == []
    assert start(folder, 1, resume="none").overrides == [], "nothing saved yet: afresh again"
    checkpoint(folder, 44)
    assert start(folder, 2, resume="none").overrides == ["run.resume=auto"]


def test_a_run_belongs_to_one_job(folder, tmp_path, monkeypatch):
    start(folder, job="7")
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$2" = --jobs=7 ] && echo RUNNING\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match="is being trained by job 7"):
        start(folder, job="8")
    end(folder.path, 1, 2)
    start(folder, job="8")


def test_a_damaged_record_is_named(folder):
    start(folder)
    (folder.path / "job.json").write_text(json.dumps({"job": 1}))
    with pytest.raises(UserError, match=r"job\.json is missing or damaged"):
        end(folder.path, 1, 2)
