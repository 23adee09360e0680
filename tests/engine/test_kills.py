"""kill -9 at seeded places inside steps and saves: the checkpoints that were there stay, the run resumes bit for bit.

`make test` tries every window once, `make test-long` many places in each (MOE_DIST_LONG=1).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moe_dist.engine.checkpoint import checkpoint_path, newest_complete, read_state, verify
from moe_dist.telemetry.run_folder import read_status
from tests.mortal import WINDOWS, Kill, counts_of, run_ranks_of_train, trace_of

STEPS, EVERY, GROUPS = 6, 2, 4
STAGES = (1, 3)
LONG = "MOE_DIST_LONG" in os.environ
KILLS = [  # stage, window, seed
    (stage, window, seed)
    for stage in STAGES
    for number, window in enumerate(WINDOWS)
    for seed in (range(3) if LONG else range(number % len(STAGES) == STAGES.index(stage)))
]


@pytest.fixture(scope="module")
def undisturbed(request, small_run, tmp_path_factory):
    """Overrides of a short run, the folder of one that went through and kept every checkpoint, and its counts."""
    folder = tmp_path_factory.mktemp(f"stage_{request.param}")
    overrides = [*small_run(folder), f"deepspeed.zero_optimization.stage={request.param}", "eval.every=0"]
    overrides += [f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "telemetry.tensorboard=false"]
    overrides += [f"train.global_batch_groups={GROUPS}", "train.micro_batch_groups=1"]
    for name, keep in (("reference", STEPS), ("counted", 1)):
        codes, printed = run_ranks_of_train([*overrides, f"checkpoint.keep={keep}"], folder / name / "run")
        assert codes == [0, 0], printed
    same(folder / "counted" / "run", folder / "reference" / "run")
    return [*overrides, "checkpoint.keep=1"], folder / "reference" / "run", counts_of(folder / "counted" / "run")


def test_there_are_enough_kills():
    assert len(KILLS) >= (50 if LONG else 8)


@pytest.mark.slow
@pytest.mark.parametrize(("undisturbed", "window", "seed"), KILLS, indirect=["undisturbed"])
def test_a_killed_rank(undisturbed, window, seed, tmp_path):
    overrides, reference, counts = undisturbed
    run_dir = tmp_path / "run"
    kill = Kill.draw(seed, window, counts)
    codes, printed = run_ranks_of_train(overrides, run_dir, kill=kill)
    assert codes[kill.rank] == -9 and codes[1 - kill.rank] == 1, printed
    trace = trace_of(run_dir)
    print(f"rank {kill.rank} died in {' < '.join(trace.stack[:3])}")
    assert trace.inside, f"{kill} did not land where it was meant to: {trace.stack}"
    check_what_is_left(run_dir, reference, kill)
    codes, printed = run_ranks_of_train(overrides, run_dir)
    assert codes == [0, 0], printed
    same(run_dir, reference)


def check_what_is_left(run_dir: Path, reference: Path, kill: Kill) -> None:
    """Every checkpoint is whole and the undisturbed run's; the newest is the last whose saving had ended."""
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    for name in left:
        if not name.endswith(".tmp"):
            verify(run_dir / "checkpoints" / name)
            assert stored(run_dir / "checkpoints" / name) == stored(reference / "checkpoints" / name)
    path = newest_complete(run_dir)
    newest = int(path.name.removeprefix("step_")) if path is not None else 0
    saving = EVERY * (kill.call + 1)  # the step that was being saved, if one was
    name = checkpoint_path(run_dir, saving).name
    match kill.window:
        case "write" | "index":  # begun, and not there yet
            assert newest == saving - EVERY and f"{name}.tmp" in left
        case "commit":  # under one name or the other
            assert newest in (saving - EVERY, saving) and (f"{name}.tmp" in left) == (newest < saving)
        case "save":
            assert newest in (saving - EVERY, saving)
        case "prune":
            assert newest == saving
        case "step" | "metrics":  # a call for each step
            assert newest == kill.call // EVERY * EVERY
        case "backward" | "optimizer":  # a call for each micro-batch
            assert newest == kill.call // (GROUPS // 2) // EVERY * EVERY
        case _:
            assert newest < STEPS


def same(run_dir: Path, reference: Path) -> None:
    """The runs ended in the same bits, with the same losses all along."""
    last = [checkpoint_path(folder, STEPS) for folder in (run_dir, reference)]
    verify(last[0])
    assert stored(last[0]) == stored(last[1])
    states: list[dict[str, Any]] = [read_state(path) for path in last]
    assert all(states[0][key] == states[1][key] for key in ("step", "tokens", "loader"))
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_dir, reference)
    ]
    losses = [[(line["step"], line["loss"], line["grad_norm"]) for line in of_run] for of_run in lines]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert read_status(run_dir)["state"] == "done"


def stored(checkpoint: Path) -> dict[str, str]:
    """Name and checksum of every file of tensors."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
