"""A real two-node Slurm cluster for all tests of this folder, and a recipe with steps long enough to interrupt."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_dist.core.errors import UserError
from moe_dist.metrics.run_folder import read_status
from tests.support import ROOT

DEVCLUSTER = ROOT / "slurm" / "devcluster.sh"
PLANTED = Path(__file__).parent / "planted"
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name, path=SBIN) is None]
PATIENCE = 300.0  # seconds; a busy machine is slow


def _run(command: Sequence[str | Path], environment: dict[str, str], folder: Path) -> str:
    for _ in range(5):
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
        if done.returncode >= 0:  # Slurm's clients die of SIGPIPE if a busy controller closes a connection
            break
        time.sleep(1)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Slurm:
    """Commands of a Slurm cluster, and methods that wait for its jobs."""

    environment: dict[str, str]
    folder: Path  # folder from which jobs are submitted and in which their logs appear

    def run(self, *command: str | Path) -> str:
        return _run(command, self.environment, self.folder)

    def devcluster(self, *arguments: str) -> str:
        return self.run(DEVCLUSTER, *arguments)

    def sbatch(self, script: str | Path, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit a script (a plain name is one of slurm/). Returns the job's number."""
        path = script if isinstance(script, Path) else ROOT / "slurm" / script
        command = ["sbatch", "--parsable", "--time=10", *options, str(path), *arguments]
        return _run(command, self.environment | variables, self.folder).strip()

    def show(self, job: str) -> dict[str, str]:
        """Return Slurm's fields of a job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in self.folder.glob(f"*-{job}.log"))

    def steps(self, run: Path) -> int:
        """Return the number of steps that a run has logged; 0 unless it is training."""
        try:
            is_running = read_status(run)["state"] == "running"
            return (run / "metrics.jsonl").read_text().count("\n") if is_running else 0
        except (UserError, OSError):
            return 0

    def until(self, condition: Callable[[], object], job: str) -> None:
        """Wait until a condition is true; fail with a job's state and log after PATIENCE seconds."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"{self.show(job)}\n{self.log(job)}"
            time.sleep(0.1)

    def ended(self, job: str, state: str = "COMPLETED") -> dict[str, str]:
        """Wait until a job ends, check its state and return Slurm's fields of the job."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
        self.until(lambda: self.show(job)["JobState"] in final, job)
        shown = self.show(job)
        assert shown["JobState"] == state, f"{shown}\n{self.log(job)}"
        return shown


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    if MISSING:
        pytest.skip(f"no {', '.join(MISSING)} here: apt-get install slurmctld slurmd slurm-client munge")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "PMI"))}
    folder = tmp_path_factory.mktemp("site")
    site = folder / "site.sh"
    site.write_text(f"VENV={sys.prefix}\n")
    environment |= {"PATH": SBIN, "SITE": str(site), "OMP_NUM_THREADS": "1"}
    try:
        _run([DEVCLUSTER, "down"], environment, folder)  # remove what a killed session left
        _run([DEVCLUSTER, "up", "2"], environment, folder)
        exports = _run([DEVCLUSTER, "env"], environment, folder)
        yield environment | dict(re.findall(r"(\w+)='([^']*)'", exports))
    finally:
        _run([DEVCLUSTER, "down"], environment, folder)


@pytest.fixture
def slurm(_cluster, tmp_path) -> Iterator[Slurm]:
    """Yield the cluster with all nodes up and without jobs."""
    slurm = Slurm(_cluster, tmp_path)
    slurm.devcluster("up", "2")
    yield slurm
    slurm.run("scancel", "--user", slurm.run("id", "-un").strip())
    end = time.monotonic() + 40
    while slurm.run("squeue", "--noheader") and time.monotonic() < end:
        time.sleep(0.1)


@pytest.fixture(scope="session")
def _data(emoji_shards, tokenizers, tmp_path_factory) -> list[str]:
    shards = shutil.copytree(emoji_shards, tmp_path_factory.mktemp("slurm") / "shards")
    return [
        f"data.shards={shards}",
        f"data.text_tokenizer={tokenizers / 'text.model'}",
        f"data.image_tokenizer={tokenizers / 'vq'}",
        *["data.sequence_length=128", "data.group_sequences=2", "data.lanes=4"],
        "data.max_bad_fraction=0.1",  # two captions are cut
        *["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.ffn.hidden_size=32"],
    ]


def _tiny(data: list[str], run: Path) -> list[str]:
    return [
        *data,
        f"run.dir={run}",
        "train.steps=20",
        "schedule.warmup_steps=2",
        *["train.global_batch_groups=32", "train.micro_batch_groups=2"],
        *["eval.every=0", "checkpoint.every=4", "telemetry.tensorboard=false"],
    ]


@pytest.fixture
def tiny(_data, tmp_path) -> list[str]:
    """Return overrides for a small quickstart: 20 steps of some tenths of a second, with a checkpoint every four."""
    return _tiny(_data, tmp_path / "run")


@dataclass(frozen=True)
class Finished:
    """A job that finished without interruption."""

    job: str
    run: Path
    overrides: list[str]
    shown: dict[str, str]
    log: str

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return metrics_of(self.run)

    def equals(self, run: Path) -> None:
        """Check that a run has the same steps and metrics, and the same tensors in the last checkpoint."""
        timed = ("seconds", "per_second")
        ours, theirs = (
            [{key: value for key, value in line.items() if not key.endswith(timed)} for line in metrics_of(each)]
            for each in (self.run, run)
        )
        assert ours == theirs
        assert _stored(self.run) == _stored(run)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _stored(run: Path) -> dict[str, str]:
    """Return the name and checksum of every file of tensors in the last checkpoint."""
    files = json.loads((run / "checkpoints" / "step_00000020" / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


@pytest.fixture(scope="session")
def undisturbed(_cluster, _data, tmp_path_factory) -> Finished:
    """Run an undisturbed job: one task per rank, two fake GPUs per node, and a site's settings."""
    folder = tmp_path_factory.mktemp("undisturbed")
    slurm = Slurm(_cluster, folder)
    site = folder / "site.sh"
    site.write_text(f'module() {{ echo "loaded ${{*:2}}"; }}\nMODULES="cuda/12 gcc"\nVENV={sys.prefix}\n')
    overrides = _tiny(_data, folder / "run")
    options = ("--gpus-per-node=2", "--cpus-per-task=1")
    job = slurm.sbatch("pretrain_moma.sh", *overrides, options=options, SITE=str(site), SBATCH_PARTITION="urgent")
    return Finished(job, folder / "run", overrides, slurm.ended(job), slurm.log(job))


@pytest.fixture
def planted(tmp_path) -> Callable[..., dict[str, str]]:
    """Return a function that makes the variables for sbatch which plant a fault, and writes the site's settings."""

    def variables(fault: str, *settings: str) -> dict[str, str]:
        site = tmp_path / "site.sh"
        site.write_text("\n".join([f"VENV={sys.prefix}", *settings, ""]))
        return {"PYTHONPATH": str(PLANTED), "PLANT": fault, "SITE": str(site)}

    return variables
