"""A checkpoint to load and to damage."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.checkpoint_jobs import Job, run


@pytest.fixture(scope="package")
def saved(tmp_path_factory):
    """A job on two ranks with a checkpoint of step 2, and its outcome."""
    job = Job(stop=4, save=str(tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000002"), save_at=2)
    return job, run(job)


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of that checkpoint to be damaged, and the job that would resume from it."""
    job, _ = saved
    folder = tmp_path / "checkpoints" / "step_00000002"
    folder.mkdir(parents=True)
    for file in Path(job.save).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder, replace(job.resumed(stop=3), load=str(folder))
