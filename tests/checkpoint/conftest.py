"""Fixtures: a checkpoint to load and to damage."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.support.checkpoint_jobs import Job, run
from tests.support.killed_ranks import EVERY, GROUPS, STEPS, How, Undisturbed, counts_of, run_ranks_of_train, same


@pytest.fixture(scope="package")
def saved(tmp_path_factory):
    """Run a job on two ranks that saves a checkpoint of step 2. Return the job and its outcome."""
    job = Job(stop=4, save=str(tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000002"), save_at=2)
    return job, run(job)


@pytest.fixture
def copied(saved, tmp_path):
    """Copy this checkpoint, so that a test can damage it. Return the copy and the job that would resume from it."""
    job, _ = saved
    folder = tmp_path / "checkpoints" / "step_00000002"
    shutil.copytree(Path(job.save).parent, folder.parent)
    return folder, replace(job.resumed(stop=3), load=str(folder))


@pytest.fixture(scope="package")
def undisturbed(small_run, tmp_path_factory) -> Callable[[How], Undisturbed]:
    """Return the undisturbed run of a layout, which is run only once."""

    @cache
    def run(how: How) -> Undisturbed:
        folder = tmp_path_factory.mktemp("undisturbed")
        overrides = [*small_run(folder), f"deepspeed.zero_optimization.stage={how.stage}", "eval.every=0"]
        overrides += [f"checkpoint.asynchronous={str(how.asynchronous).lower()}", f"checkpoint.every={EVERY}"]
        overrides += [f"train.steps={STEPS}", f"train.global_batch_groups={GROUPS}", "train.micro_batch_groups=1"]
        overrides += ["telemetry.tensorboard=false"]
        for name, keep in (("reference", STEPS), ("counted", 1)):
            codes, printed = run_ranks_of_train([*overrides, f"checkpoint.keep={keep}"], folder / name / "run")
            assert codes == [0, 0], printed
        reference, counted = folder / "reference" / "run", folder / "counted" / "run"
        same(counted, reference)
        return Undisturbed(how, [*overrides, "checkpoint.keep=1"], reference, counts_of(counted))

    return run
