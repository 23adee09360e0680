"""This module decides whether a scheduler runs a job again.

The decision is based on RUN/status.json, which says how the last attempt ended, and on RUN/job.json, which says how the
attempt started and how many failures preceded it.

A job is attempted until its run is done. After a failed attempt, the next attempt resumes from the last checkpoint.
There is no next attempt after an error that a person must fix, or after `max_failures` failures in a row without a
newer checkpoint. If an attempt's node dies, the attempt cannot record how it ended. The next attempt then determines
this from the files. While a job is training in a run folder, a second job in that folder is refused. Once a job has
written a checkpoint, its later attempts resume even if the recipe says run.resume=none (see `begin`).

This module does not import torch, since it runs before and after the ranks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moe_dist.config.recipe import Config
from moe_dist.core.errors import UserError
from moe_dist.core.files import read_json, write_file
from moe_dist.metrics.run_folder import RunFolder, read_status

Verdict = Literal["done", "stopped", "again", "wrong", "given up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt to run a job, as stored in RUN/job.json."""

    job: str
    step: int  # step of the newest checkpoint when the attempt started
    found: dict[str, int]  # checkpoints that existed at the job's first start, and their times of writing, ns
    failures: int  # failed attempts of this job in a row without a newer checkpoint
    status: int  # time at which status.json was last written before this attempt, ns; 0 if it did not exist
    open: bool = True  # its ending has not been judged yet


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of an attempt: the step from which it resumes, and the overrides to append to the command line."""

    step: int
    overrides: list[str]


@dataclass(frozen=True, slots=True)
class Ending:
    verdict: Verdict
    sentence: str
    failures: int = 0


def begin(config: Config, job: str, restarts: int, max_failures: int) -> Plan | None:
    """Record the start of the next attempt of `job` and return its plan, or None if the run is already done.

    restarts: number of times that Slurm has restarted this job. max_failures: as in `settle`. Raises UserError if
    another job is training in the run folder, or if the last attempt failed and `settle` decides against another one.
    """
    folder = RunFolder(Path(config.run.dir))
    before = _read(folder)
    status = _status(folder)
    if before is not None and before.job != job:
        if before.open and _is_running(before.job):
            raise UserError(f"run.dir={folder.path} is being trained by job {before.job}")
        before = None
    if restarts == 0:
        before = None  # newly submitted: job.json is from another job with this number, whose failures do not count
    again = before is not None or config.run.resume == "auto"
    if status.get("state") == "done" and again:
        return None
    failures = 0
    if before is not None:
        ending = settle(folder, before, None, max_failures) if before.open else Ending("again", "", before.failures)
        if ending.verdict in ("wrong", "given up"):
            raise UserError(ending.sentence)
        failures = ending.failures
    checkpoints = _checkpoints(folder)
    step, found = _newest(checkpoints), checkpoints if before is None else before.found
    _write(folder, Attempt(job=job, step=step, found=found, failures=failures, status=_written(folder)))
    if config.run.resume == "auto":
        return Plan(step, [])
    # If the recipe starts from scratch, or from another run's checkpoint, do so once, not after every interruption.
    own = checkpoints.items() - found.items()
    return Plan(step, ["run.resume=auto"]) if own else Plan(0, [])


def end(run: Path, code: int, max_failures: int) -> Ending:
    """Return how an attempt ended and whether the job will run again. Record in job.json that the attempt has ended.

    code: the exit status of the attempt's launcher. max_failures: as in `settle`. Raises UserError if job.json is
    missing or damaged.
    """
    folder = RunFolder(run)
    attempt = _read(folder)
    if attempt is None:
        raise UserError(f"{_file(folder)} is missing or damaged: it is written at the start of a job")
    ending = settle(folder, attempt, code, max_failures)
    _write(folder, replace(attempt, failures=ending.failures, open=False))
    return ending


def settle(folder: RunFolder, attempt: Attempt, code: int | None, max_failures: int) -> Ending:
    """Determine from status.json and the run's checkpoints how an attempt ended and whether the job runs again.

    code: the launcher's exit status; None if it is unknown. max_failures: the job does not run again after this many
    failures in a row without a newer checkpoint.
    """
    status = _status(folder) if _written(folder) != attempt.status else {}  # if unchanged, it is an earlier attempt's
    state, reason = status.get("state"), status.get("reason")
    where = f"after {status.get('step', attempt.step)} steps"
    if state == "done":
        return Ending("done", f"done {where}")
    if state == "stopped":
        return Ending("again" if status["restart"] else "stopped", f"stopped {where}: {reason}")
    if (state == "failed" and not status["restart"]) or (not status and code == 2):
        return Ending("wrong", f"failed {where}, and restarting cannot help: {reason or 'see above'}")
    failed = f"failed {where}: {reason or f'its ranks exited without writing a status (exit status {code})'}"
    if _newest(_checkpoints(folder)) > attempt.step:
        return Ending("again", failed)
    failures = attempt.failures + 1
    if failures < max_failures:
        return Ending("again", f"{failed} (failure {failures} of {max_failures} without a newer checkpoint)", failures)
    return Ending("given up", f"{failed}; given up after {failures} failures without a newer checkpoint", failures)


def _file(folder: RunFolder) -> Path:
    return folder.path / "job.json"


def _read(folder: RunFolder) -> Attempt | None:
    with suppress(UserError, TypeError):
        return Attempt(**read_json(_file(folder)))
    return None


def _write(folder: RunFolder, attempt: Attempt) -> None:
    file = _file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(asdict(attempt)) + "\n")


def _status(folder: RunFolder) -> dict[str, Any]:
    with suppress(UserError):
        return read_status(folder.path)
    return {}


def _written(folder: RunFolder) -> int:
    with suppress(OSError):
        return folder.status.stat().st_mtime_ns
    return 0


def _checkpoints(folder: RunFolder) -> dict[str, int]:
    """Return a dict from the name of each finished checkpoint to the time when the checkpoint was written, in ns.

    A checkpoint is finished once its folder has its final name.
    """
    found = sorted(path for path in folder.checkpoints.glob("step_*") if path.name[5:].isdecimal())
    return {path.name: path.stat().st_mtime_ns for path in found}


def _newest(checkpoints: dict[str, int]) -> int:
    return max((int(name.removeprefix("step_")) for name in checkpoints), default=0)


def _is_running(job: str) -> bool:
    if shutil.which("squeue") is None:
        return False
    command = ["squeue", "--noheader", f"--jobs={job}", "--states=running,suspended", "--format=%T"]
    return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
