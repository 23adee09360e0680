"""metrics.jsonl, TensorBoard's real event files, and W&B through a stand-in package that records its calls."""

import json
import sys
import textwrap

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_dist.core.errors import UserError
from moe_dist.metrics.metric_keys import KEYS, undeclared
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.metrics.sinks import Sinks, TensorBoard
from tests.metrics.test_run_folder import make_config

METRICS = {
    "tokens": 4096,
    "loss": 5.5,
    "loss/text": 4.5,
    "loss/image": float("nan"),
    "eval/loss": 5.0,
    "eval/loss/text": 4.0,
    "lr": 1e-3,
    "grad_norm": float("inf"),
    "step_seconds": 0.5,
    "data_wait_seconds": 0.01,
    "tokens_per_second": 8192.0,
    "model_flops_per_second": 1e9,
    "moe/0/utilization": [1.5, float("nan")],
    "moe/rank_imbalance": 1.1,
    "moe/0/experts_per_token/text": 1.0,
    "moe/0/unrouted_fraction/image": 0.25,
}


def open_sinks(path, *overrides, step=0, causal=True, is_main=True):
    config = make_config(path, *overrides)
    folder = RunFolder(path)
    folder.open(config, step=step)
    return Sinks(folder, config, is_main=is_main, causal=causal, step=step)


def read_lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def read_events(folder):
    events = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_line_is_valid_json_with_declared_keys_and_is_there_at_once(tmp_path):
    sinks = open_sinks(tmp_path, "telemetry.tensorboard=false", causal=False)
    sinks.log(1, METRICS)
    (line,) = read_lines(tmp_path)  # before close
    assert not undeclared(line)
    assert (line["step"], line["causal"], line["loss"], line["lr"]) == (1, False, 5.5, 1e-3)
    assert line["loss/image"] is None and line["grad_norm"] is None and line["moe/0/utilization"] == [1.5, None]
    assert line.keys() == METRICS.keys() | {"step", "causal"}
    sinks.close()


def test_names_outside_the_table_are_found():
    assert undeclared(["loss", "loss/audio", "moe/x/utilization", "moe/12/utilization", "Loss", "loss/text/1"]) == [
        "loss/audio",
        "moe/x/utilization",
        "Loss",
        "loss/text/1",
    ]
    promised = """step tokens loss loss/{modality} eval/loss eval/loss/{modality} lr grad_norm step_seconds
        data_wait_seconds tokens_per_second model_flops_per_second moe/{layer}/utilization
        moe/{layer}/experts_per_token/{modality} moe/{layer}/unrouted_fraction/{modality} moe/rank_imbalance"""
    assert set(promised.split()) <= KEYS.keys()


def test_tensorboard_holds_the_scalars_and_a_resume_hides_later_ones(tmp_path):
    sinks = open_sinks(tmp_path)
    for step in (1, 2, 3):
        sinks.log(step, {"loss": float(step), "moe/0/utilization": [0.5, 1.5]})
    sinks.close()
    sinks = open_sinks(tmp_path, step=2)
    sinks.log(3, {"loss": 30.0})
    sinks.close()
    scalars = read_events(tmp_path / "tensorboard")
    assert scalars["loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert scalars["moe/0/utilization/1"] == [(1, 1.5), (2, 1.5)]
    assert [line["loss"] for line in read_lines(tmp_path)] == [1.0, 2.0, 30.0]


def test_tensorboard_names_non_causal_curves(tmp_path):
    sinks = open_sinks(tmp_path, causal=False)
    sinks.log(1, {"loss": 1.0})
    sinks.close()
    assert read_events(tmp_path / "tensorboard" / "non-causal") == {"loss": [(1, 1.0)]}


def test_a_failing_tensorboard_is_reported_once_and_training_goes_on(tmp_path, monkeypatch, capfd):
    def fail(self, step, metrics):
        raise OSError("no space left on device")

    monkeypatch.setattr(TensorBoard, "log", fail)
    sinks = open_sinks(tmp_path)
    for step in (1, 2, 3):
        sinks.log(step, METRICS)
    sinks.close()
    assert len(read_lines(tmp_path)) == 3
    assert capfd.readouterr().err.count("warning: TensorBoard failed") == 1


def test_a_tensorboard_that_cannot_start_is_left_out(tmp_path, capfd):
    config = make_config(tmp_path)
    folder = RunFolder(tmp_path)
    folder.open(config)
    folder.tensorboard.rmdir()
    folder.tensorboard.write_text("a file where the folder should be")
    sinks = Sinks(folder, config, is_main=True, causal=True)
    sinks.log(1, METRICS)
    sinks.close()
    assert len(read_lines(tmp_path)) == 1
    assert "warning: TensorBoard failed" in capfd.readouterr().err


def test_metrics_that_cannot_be_written_end_the_run(tmp_path):
    config = make_config(tmp_path, "telemetry.tensorboard=false")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    sinks = Sinks(RunFolder(tmp_path), config, is_main=True, causal=True)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: No space left"):
        sinks.log(1, METRICS)


def test_other_ranks_write_nothing(tmp_path):
    sinks = Sinks(RunFolder(tmp_path), make_config(tmp_path), is_main=False, causal=True)
    sinks.log(1, METRICS)
    sinks.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_main", [True, False])
def test_a_missing_wandb_names_the_key_on_every_rank(tmp_path, monkeypatch, is_main):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = make_config(tmp_path, "telemetry.wandb_project=lab")
    with pytest.raises(UserError, match=r"telemetry\.wandb_project=lab needs the package wandb"):
        Sinks(RunFolder(tmp_path), config, is_main=is_main, causal=True)


def test_wandb_gets_the_scalars_and_a_resume_goes_on_in_the_same_run(tmp_path, monkeypatch):
    package = tmp_path / "packages"
    package.mkdir()
    (package / "wandb.py").write_text(
        textwrap.dedent("""
        calls = []
        class Run:
            def log(self, metrics, step): calls.append((step, metrics))
            def finish(self): calls.append("finish")
        def init(**settings):
            calls.append(settings)
            return Run()
        """)
    )
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    project = ["telemetry.wandb_project=lab", "telemetry.tensorboard=false"]
    for step in (0, 1, 0):
        sinks = open_sinks(tmp_path / "run", *project, step=step, causal=False)
        sinks.log(step + 1, {"loss": 2.0, "moe/0/utilization": [0.5, 1.5]})
        sinks.close()
    calls = sys.modules.pop("wandb").calls
    first, again, fresh = calls[0], calls[3], calls[6]
    assert (first["project"], first["name"], first["tags"]) == ("lab", "run", ["non-causal"])
    assert first["id"] == again["id"] != fresh["id"]
    assert calls[1] == (1, {"loss": 2.0, "moe/0/utilization/0": 0.5, "moe/0/utilization/1": 1.5})
    assert calls[2] == "finish"
