"""benchmarks/gpu_check.py, whole, on the CPU at small sizes: every part runs and finds what is right."""

import json
import subprocess
import sys

import pytest

from tests.support import ROOT

PARTS = ["machine", "products", "models", "engine", "resume", "two_ranks", "speed", "layer", "saver"]


def check(folder, *arguments):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--device", "cpu", "--out", folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    lines = [json.loads(line) for line in (folder / "gpu_check.jsonl").read_text().splitlines()]
    return done, lines


@pytest.mark.slow
def test_every_part_runs_on_the_cpu(tmp_path):
    done, lines = check(tmp_path, "--seconds", "900")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [line["part"] for line in lines if line["what"] == "part"] == PARTS
    assert {line["result"] for line in lines} == {"seen", "right", "measured", "ended"}
    table = (tmp_path / "gpu_check.md").read_text()
    assert table.count("\n") == len(lines) + 2 and table in done.stdout
    layers = {line["what"]: line for line in lines if line["part"] == "layer" and line["what"] != "part"}
    assert len(layers) == 6 and all(line["ours"] > 0 < line["bmm"] for line in layers.values())
    assert all(line["tokens_s"] > 0 for line in lines if line["part"] == "speed" and line["what"] != "part")


FAULTY = """
import runpy, sys
import moe_dist.model.moe.experts as experts
multiply = experts.matmul_by_expert
experts.matmul_by_expert = lambda x, weight, counts: multiply(x, weight, counts) * 1.1
sys.path.insert(0, {benchmarks!r})
sys.argv = ["gpu_check.py", "--device", "cpu", "--out", {out!r}, "--part", "products"]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_planted_fault_is_found(tmp_path):
    """Experts' products a tenth too large."""
    benchmarks = ROOT / "benchmarks"
    code = FAULTY.format(benchmarks=str(benchmarks), out=str(tmp_path), script=str(benchmarks / "gpu_check.py"))
    environment = {"GPU_CHECK_SCRATCH": str(tmp_path), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300, cwd=ROOT)
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    wrong = [line["what"] for line in lines if line["result"] == "WRONG"]
    assert wrong and all(what.startswith("experts' products") for what in wrong)


def test_a_part_without_time_is_left_out_and_fails_the_check(tmp_path):
    done, lines = check(tmp_path, "--seconds", "1", "--only", "machine")
    assert done.returncode == 1 and lines == [{"part": "machine", "what": "part", "result": "LEFT OUT: no time"}]


def test_an_unknown_part_is_named(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--only", "models,nonsense", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--only names nonsense; the parts are machine, products" in done.stderr
