"""The run folder: what it holds, what a resume cuts away, and that a reader never meets half a file."""

import json
from datetime import datetime

import pytest

from moe_dist.config import load_config
from moe_dist.errors import UserError
from moe_dist.telemetry.run_folder import RunFolder, read_status

RECIPE = "configs/moma_quickstart.yaml"


def make_config(run_dir, *overrides):
    return load_config(RECIPE, [f"run.dir={run_dir}", *overrides])


def steps(folder):
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


def write_lines(folder, numbers, tail=""):
    folder.metrics.write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in numbers) + tail)


def test_open_makes_everything(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run")
    config = make_config(folder.path, "train.steps=7")
    folder.open(config)
    assert load_config(folder.config) == config
    assert {path.name for path in folder.path.iterdir()} == {
        "config.yaml", "metrics.jsonl", "status.json", "checkpoints", "tensorboard", "samples",
    }  # fmt: skip
    status = read_status(folder.path)
    assert (status["state"], status["step"], status["reason"]) == ("running", 0, None)
    assert datetime.fromisoformat(status["updated"]).tzinfo


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

    def crash(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_dist.telemetry.run_folder.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        folder.open(make_config(tmp_path), step=2)
    assert steps(folder) == [1, 2, 3, 4]


def test_status_is_replaced_as_a_whole(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_status("running", 3)
    with folder.status.open() as reader:  # opened before: goes on seeing the old file
        folder.write_status("failed", 4, "the loss of step 4 is not finite")
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
