"""The efficiency study on one GPU (benchmarks/moma_eta_gpu.py), whole, on the CPU at a tiny size."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from moe_dist.config.recipe import load_config
from moe_dist.data.cache.token_cache import load_vocabulary, open_store
from moe_dist.data.stream.loader import make_loader
from tests.support import ROOT
from tests.support.long import LONG

TINY = [
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.ffn.hidden_size=32",
    "deepspeed.log_level=error",
]
DATA = ["data.sequence_length=128", "data.group_sequences=2", "data.lanes=1", "data.image_fraction=null"]
DATA += ["data.max_bad_fraction=0.1"]  # two captions are cut
TOKENS = 12 * 256


@pytest.fixture(scope="module")
def data(emoji_shards, tokenizers, tmp_path_factory) -> list[str]:
    shards = shutil.copytree(emoji_shards, tmp_path_factory.mktemp("eta") / "shards")  # tokens are stored beside them
    files = [f"data.shards={shards}", f"data.text_tokenizer={tokenizers / 'text.model'}"]
    return [*files, f"data.image_tokenizer={tokenizers / 'vq'}", *DATA]


@pytest.fixture(scope="module")
def inputs(data, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("inputs") / "eta.npz.xz"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        importlib.import_module("gpu.eta_data").write_inputs(file, data, batches=12, held_out=3)
    return file


def study(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/moma_eta.py", "--gpu", "--device", "cpu", "--out", str(out), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def test_batches_of_the_file_are_those_of_the_loader(inputs, data, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    read_inputs = importlib.import_module("gpu.eta_data").read_inputs
    config = load_config(ROOT / "configs" / "moma_quickstart.yaml", data)
    vocabulary = load_vocabulary(config.data)
    store = open_store(config.data, "train", vocabulary)
    loader = make_loader(store, vocabulary, config.data, seed=0, dp_rank=0, dp=1, batch_groups=1)
    train, held_out = read_inputs(inputs)
    assert len(train) == 12 and len(held_out) == 6
    for number in range(len(train)):
        expected, got = next(loader).batch, train.batch(number)
        for one, other in ((expected, got), (expected.info, got.info)):
            for field in fields(one):
                if isinstance(value := getattr(one, field.name), torch.Tensor):
                    assert torch.equal(value, getattr(other, field.name)), field.name
                elif field.name != "info":
                    assert value == getattr(other, field.name), field.name
    seen = train.times_seen(12)
    assert seen["image"] == round(sum(int(train.batch(n).info.modality_T.sum()) for n in range(12)) / (132 * 16), 2)


@pytest.fixture
def job(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("moma_eta_gpu")


def test_the_sweep_takes_the_best_common_rate_and_leaves_out_what_diverged(job):
    def swept(name, rate, losses):
        one = job.Job(name=name, rate=rate, steps=10, evaluations=1, inputs="", file="", deadline=0)
        return one, {"reached": len(losses), "train": {"loss": losses}}

    runs = [
        swept("dense", 2e-3, [5, 5, 5, 5, 5, 5, 5, 4.5, 1]),
        swept("4t4i", 2e-3, [5, 5, 5, 5, 5, 5, 5, 4.0]),
        swept("dense", 4e-3, [5, 5, 5, 5, 5, 5, 5, 4.2]),
        swept("4t4i", 4e-3, [5, 5, 5, 5, 5, 5, 5, 4.1]),
        swept("dense", 8e-3, [5, 5, 5, 5, 5, 5, 5, 1.0]),
        swept("4t4i", 8e-3, [5, 5]),
    ]
    found = job.chosen(runs)
    assert found["rate"] == 4e-3 and found["sweep_step"] == 8
    assert found["sweep"]["0.008"] == {"dense": 1.0} and found["sweep"]["0.002"] == {"dense": 4.5, "4t4i": 4.0}
    assert job.chosen([])["rate"] == job.RATE
    assert job.step_seconds({"train": {"seconds": [1.0, 1.5, 2.5]}}) == 0.75 and job.step_seconds({}) == 0


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="a study's whole path, a minute of processor time: make test-long runs it")
def test_the_study_sweeps_runs_stops_goes_on_and_writes_its_page(inputs, tmp_path):
    sizes = ["--inputs", str(inputs), "--tokens", str(TOKENS), "--batch-tokens", "256", "--models", "dense,MoD 4t4i"]
    first = study(tmp_path, *sizes, "--sweep", "--rates", "0.002", "--seconds", "300", *TINY)
    assert first.returncode == 0, first.stdout + first.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["rate"] == 0.002 and set(plan["sweep"]["0.002"]) == {"dense", "4t4i"} and plan["step_seconds"] > 0
    curves = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json") if file.stem != "plan"}
    assert set(curves) == {"dense", "MoD_4t4i"}
    for curve in curves.values():
        assert curve["done"] and curve["reached"] == len(curve["train"]["loss"]) == plan["steps"] == 12
        assert len(curve["held_out"]["loss"]) == 12
        assert curve["train"]["tokens"] == curves["dense"]["train"]["tokens"]
        assert curve["train"]["flops"][-1] == pytest.approx(curves["dense"]["train"]["flops"][-1], rel=0.1)

    cut = json.loads((tmp_path / "MoD_4t4i.json").read_text()) | {"done": False}
    (tmp_path / "MoD_4t4i.json").write_text(json.dumps(cut))
    before = (tmp_path / "dense.json").stat().st_mtime_ns
    late = study(tmp_path, *sizes, "--seconds", "1", *TINY)
    assert late.returncode == 1 and "MoD 4t4i: cut off at step 12" in late.stdout, late.stdout + late.stderr
    again = study(tmp_path, *sizes, "--seconds", "200", *TINY)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "dense.json").stat().st_mtime_ns == before

    results = tmp_path / "results"
    results.mkdir()
    written = study(tmp_path, "--write-only", "--results", str(results))
    assert written.returncode == 0, written.stdout + written.stderr
    page = next(results.glob("*-moma_eta_gpu.md")).read_text()
    assert "no GPU" in page and "| MoD 4t4i |" in page
    assert {file.suffix for file in results.iterdir()} == {".md", ".json", ".png"}
