"""train.deterministic reaches torch and cuBLAS before the device is used. On a GPU gpu-check's `resume` shows it."""

import json
import os
from pathlib import Path

import pytest
import torch

from moe_dist.config.recipe import load_config
from moe_dist.training.run import train
from tests.support.distributed import run_ranks
from tests.support.launching import MOMA


def _settings_when_the_device_starts(rank, overrides):
    found = []

    def started(stop):
        found.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        patch.setattr("moe_dist.training.run.init_distributed", started)
        try:
            train(load_config(MOMA, overrides))
        except KeyboardInterrupt:
            return found
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("setting", "expected"), [("true", (True, ":4096:8")), ("false", (False, None))])
def test_the_setting_comes_before_the_device(setting, expected, tmp_path):
    overrides = [f"run.dir={tmp_path}", f"train.deterministic={setting}", "parallel.expert=1"]
    assert run_ranks(_settings_when_the_device_starts, 1, overrides) == [[expected]]


def test_a_deterministic_run_trains_as_on_the_cpu_it_does_anyway(overrides, tmp_path):
    settings = [[f"train.deterministic={on}", f"run.dir={tmp_path / on}"] for on in ("true", "false")]
    losses = [run_ranks(_losses, 1, [*overrides, *own])[0] for own in settings]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def _losses(rank, overrides):
    config = load_config(MOMA, [*overrides, "parallel.expert=1", "train.stop_after=2"])
    try:
        train(config)
    finally:
        torch.use_deterministic_algorithms(False)
    lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
