"""The efficiency study on one GPU (benchmarks/moma_eta_gpu.py), whole, on the CPU at a tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from moe_dist.config import load_config
from moe_dist.data.loader import make_loader
from moe_dist.data.tokenized import load_vocabulary, open_store

ROOT = Path(__file__).parent.parent
TINY = [
    "model.hidden_size=32", "model.num_heads=2", "model.ffn.hidden_size=32", "deepspeed.log_level=error",
]  # fmt: skip
DATA = ["data.sequence_length=128", "data.group_sequences=2", "data.lanes=1", "data.image_fraction=null"]
TOKENS = 12 * 256


@pytest.fixture(scope="module")
def data(emoji_shards, tokenizers) -> list[str]:
    files = [f"data.shards={emoji_shards}", f"data.text_tokenizer={tokenizers / 'text.model'}"]
    return [*files, f"data.image_tokenizer={tokenizers / 'vq'}", *DATA]


@pytest.fixture(scope="module")
def inputs(data, tmp_path_factory) -> Path:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from gpu.eta_data import write_inputs
    finally:
        sys.path.pop(0)
    file = tmp_path_factory.mktemp("inputs") / "eta.npz.xz"
    write_inputs(file, data, batches=12, held_out=3)
    return file


def study(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/moma_eta.py", "--gpu", "--device", "cpu", "--out", str(out), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def test_batches_of_the_file_are_those_of_the_loader(inputs, data):
    from gpu.eta_data import read_inputs

    config = load_config(ROOT / "configs" / "moma_quickstart.yaml", data)
    vocabulary = load_vocabulary(config.data)
    store = open_store(config.data, "train", vocabulary)
    loader = make_loader(store, vocabulary, config.data, seed=0, dp_rank=0, dp=1, batch_groups=1)
    train, held_out = read_inputs(inputs)
    assert len(train) == 12 and len(held_out) == 6
    for number in range(len(train)):
        expected, got = next(loader)[0], train.batch(number)
        for one, other in ((expected, got), (expected.info, got.info)):
            for field in fields(one):
                if isinstance(value := getattr(one, field.name), torch.Tensor):
                    assert torch.equal(value, getattr(other, field.name)), field.name
                elif field.name != "info":
                    assert value == getattr(other, field.name), field.name
    seen = train.times_seen(12)
    assert seen["image"] == round(sum(int(train.batch(n).info.modality_T.sum()) for n in range(12)) / (132 * 16), 2)


@pytest.mark.slow
def test_the_study_runs_sweeps_stops_goes_on_and_writes_its_page(inputs, tmp_path):
    sizes = ["--inputs", str(inputs), "--tokens", str(TOKENS), "--batch-tokens", "256", "--jobs", "2"]
    first = study(tmp_path, *sizes, "--sweep", "--seconds", "300", *TINY)
    assert first.returncode == 0, first.stdout + first.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert set(plan["sweep"]) == {"0.002", "0.004", "0.008"} and f"{plan['rate']:g}" in plan["sweep"]
    curves = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json") if file.stem != "plan"}
    assert set(curves) == {"dense", "moe_8x", "1t1i", "4t4i", "MoD_4t4i"}
    for curve in curves.values():
        assert curve["done"] and curve["reached"] == len(curve["train"]["loss"]) == plan["steps"] == 12
        assert len(curve["held_out"]["loss"]) == 12
        assert curve["train"]["tokens"] == curves["dense"]["train"]["tokens"]
        assert curve["train"]["flops"][-1] == pytest.approx(curves["dense"]["train"]["flops"][-1], rel=0.1)

    cut = json.loads((tmp_path / "1t1i.json").read_text()) | {"done": False}
    (tmp_path / "1t1i.json").write_text(json.dumps(cut))
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    again = study(tmp_path, *sizes, "--seconds", "200", *TINY)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {name for name, time in before.items() if (tmp_path / name).stat().st_mtime_ns != time} == {"1t1i.json"}

    results = tmp_path / "results"
    results.mkdir()
    written = study(tmp_path, "--write-only", "--results", str(results))
    assert written.returncode == 0, written.stdout + written.stderr
    page = next(results.glob("*-moma_eta_gpu.md")).read_text()
    assert "no GPU" in page and "| MoD 4t4i |" in page and {file.suffix for file in results.iterdir()} == {
        ".md", ".json", ".png",
    }  # fmt: skip


@pytest.mark.slow
def test_the_deadline_leaves_what_was_reached(inputs, tmp_path):
    sizes = ["--inputs", str(inputs), "--tokens", str(TOKENS), "--batch-tokens", "256", "--jobs", "5"]
    ended = study(tmp_path, *sizes, "--seconds", "3", *TINY)
    assert ended.returncode == 1 and "not begun" in ended.stdout
