"""The run folder: what it holds, what a resume cuts away, and that a reader never meets half a file."""

import json
import os
from datetime import datetime

import pytest

from moe_dist.config.recipe import load_config
from moe_dist.core.errors import PeerError, UserError
from moe_dist.metrics.run_folder import BEAT_SECONDS, RunFolder, read_status
from moe_dist.parallel.signals import Stopped

RECIPE = "configs/moma_quickstart.yaml"


def make_config(run_dir, *overrides):
    return load_config(RECIPE, [f"run.dir={run_dir}", *overrides])


def steps(folder):
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


def told(folder):
    status = read_status(folder.path)
    return tuple(status[key] for key in ("state", "step", "reason", "restart"))


def write_lines(folder, numbers, tail=""):
    folder.metrics.write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in numbers) + tail)


def test_open_makes_everything(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run")
    config = make_config(folder.path, "train.steps=7")
    folder.open(config)
    assert load_config(folder.config) == config
    assert {path.name for path in folder.path.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "status.json",
        "checkpoints",
        "tensorboard",
        "samples",
    }
    assert told(folder) == ("running", 0, None, True)
    assert datetime.fromisoformat(read_status(folder.path)["updated"]).tzinfo


def test_resume_cuts_the_lines_after_the_step_and_keeps_the_rest(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open(make_config(tmp_path))
    write_lines(folder, range(1, 11), tail='{"step": 11, "lo')
    before = folder.metrics.read_text().splitlines()
    folder.open(make_config(tmp_path), step=6)
    assert folder.metrics.read_text().splitlines() == before[:6]
    write_lines(folder, range(1, 6), tail='{"step": 6}')  # whole, but for the end of the line
    folder.open(make_config(tmp_path), step=6)
    assert folder.metrics.read_text().endswith('{"step": 6}\n') and steps(folder) == [1, 2, 3, 4, 5, 6]


def test_a_fresh_start_sets_the_old_curve_aside(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open(make_config(tmp_path))
    write_lines(folder, [1, 2])
    folder.open(make_config(tmp_path))
    folder.open(make_config(tmp_path))  # the second fresh start has nothing to set aside
    assert steps(folder) == []
    assert len((tmp_path / "metrics.previous.jsonl").read_text().splitlines()) == 2


def test_a_crash_while_cutting_loses_nothing(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.open(make_config(tmp_path))
    write_lines(folder, range(1, 5))

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.rename", crash)
    with pytest.raises(KeyboardInterrupt):
        folder.open(make_config(tmp_path), step=2)
    assert steps(folder) == [1, 2, 3, 4]


def test_status_is_replaced_as_a_whole(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_status("running", 3, restart=True)
    with folder.status.open() as reader:  # opened before: goes on seeing the old file
        folder.write_status("failed", 4, "the loss of step 4 is not finite", restart=False)
        assert json.load(reader)["state"] == "running"
    assert read_status(tmp_path)["reason"] == "the loss of step 4 is not finite"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"run\.dir=.*file/run cannot be written: Not a directory"):
        folder.open(make_config(folder.path))


def test_no_status(tmp_path):
    with pytest.raises(UserError, match=r"status\.json is missing"):
        read_status(tmp_path)


@pytest.mark.parametrize(
    ("step", "signal", "expected"),
    [
        (8, None, ("done", 8, None, False)),
        (8, "SIGTERM", ("done", 8, None, False)),
        (5, "SIGTERM", ("stopped", 5, "SIGTERM", True)),
        (5, None, ("stopped", 5, "train.stop_after", False)),  # the same start would stop there again
    ],
)
def test_the_end_of_a_run(step, signal, expected, tmp_path):
    folder = RunFolder(tmp_path)
    line = folder.write_end(step, 8, signal)
    assert told(folder) == expected
    assert line.startswith(f"{expected[0]} ") and str(tmp_path) in line


FAILURES = [
    (UserError("the key is wrong"), ("failed", "the key is wrong", False)),
    (PermissionError(13, "Permission denied", "/x"), ("failed", "/x: Permission denied", False)),
    (RuntimeError("Connection closed by peer"), ("failed", "Connection closed by peer", True)),
    (PeerError("KeyError('x') (rank 1)"), ("failed", "KeyError('x') (rank 1)", True)),
    (KeyboardInterrupt(), ("failed", "KeyboardInterrupt", True)),
    (Stopped("SIGUSR1"), ("stopped", "SIGUSR1", True)),
]


@pytest.mark.parametrize(("error", "expected"), FAILURES, ids=lambda value: type(value).__name__)
def test_what_ends_a_run_early(error, expected, tmp_path):
    state, reason, restart = expected
    folder = RunFolder(tmp_path / "run")
    folder.write_failure(error, None)  # in the set-up of a new run: makes the folder
    assert told(folder) == (state, 0, reason, restart)
    folder.write_failure(error, 7)  # while it trained
    assert told(folder) == (state, 7, reason, restart)
    for before in ("running", "stopped", "failed"):  # in a later set-up: what was trained stays told
        folder.write_status(before, 9, restart=True)
        folder.write_failure(error, None)
        assert told(folder) == (state, 9, reason, restart)
    folder.write_end(9, 9, None)
    folder.write_failure(error, None)  # and a run that was done still is
    assert told(folder) == ("done", 9, None, False)
    folder.write_failure(error, 0)  # but not once another has begun in its folder
    assert told(folder) == (state, 0, reason, restart)


def test_a_disk_that_takes_no_status_hides_nothing(tmp_path):
    (tmp_path / "run").write_text("a file")
    RunFolder(tmp_path / "run").write_failure(UserError("what came before"), None)


def test_the_status_of_a_run_that_lives_is_renewed_now_and_then(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_status("running", 3, restart=True)
    folder.beat(4)
    assert told(folder)[1] == 3
    earlier = folder.status.stat().st_mtime - BEAT_SECONDS
    os.utime(folder.status, (earlier, earlier))
    folder.beat(5)
    assert told(folder) == ("running", 5, None, True)
