"""The folder of a run: config.yaml, init_from.json, reached.json, metrics.jsonl, status.json, checkpoints/, and so on.

The health checks add health.json and stacks/. A job under a scheduler adds job.json and logs/ (docs/slurm.md). Only
rank 0 writes to the folder. A file that is rewritten is replaced atomically, so a reader never sees half a file. When a
run resumes, the lines of metrics.jsonl after the step at which it resumes are removed.

The file status.json is the authority on how a run ended, since launchers may exit with 0 after a signal or a failure:
    state     running | done | stopped (there is more to train) | failed
    step      optimizer steps done
    reason    why it stopped (a signal's name, or the recipe's train.stop_after) or failed; else null
    restart   for schedulers: whether starting the run again without changes can help
    updated   time of writing, UTC
If a run is killed, `state` stays running and `restart` stays true. So if the launcher has returned and `state` is
running, the run was killed. If it is not known whether the launcher has returned, look at `updated`. A run renews
`updated` while it trains (`beat`). An old time suggests that the run no longer makes progress.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from moe_dist.config.recipe import Config, load_stored_config, save_config
from moe_dist.core.errors import UserError, as_user_error
from moe_dist.core.files import json_text, new_file, read_json, write_file
from moe_dist.parallel.signals import Stopped

BEAT_SECONDS = 10.0  # least time between two renewals of status.json during training

RunState = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of a run's files, and methods that write the files. All ranks use the paths; only rank 0 writes."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def initial(self) -> Path:
        return self.path / "init_from.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    def open(self, config: Config, *, step: int = 0) -> None:
        """Prepare the folder for a run that starts after `step` steps.

        Raises UserError if the folder cannot be written. If the run resumes, remove the lines of metrics.jsonl after
        `step`, because the run writes these steps again. If the run starts fresh (step 0), rename the previous run's
        metrics.jsonl to metrics.previous.jsonl.
        """
        with self._writing():
            for folder in (self.checkpoints, self.tensorboard, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
            with new_file(self.config) as partial:
                save_config(config, partial)
            self.metrics.touch()
            if step > 0:
                write_file(self.metrics, "".join(f"{line}\n" for line in _lines(self.metrics) if _step(line) <= step))
            elif self.metrics.stat().st_size:
                self.metrics.rename(self.metrics.with_suffix(".previous.jsonl"))
        self.write_status("running", step, restart=True)

    def write_health(self, health: dict[str, Any]) -> None:
        """Write health.json, the result of the checks before training. Raises UserError if writing fails."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.path / "health.json", json_text(health))

    def write_initial(self, account: dict[str, Any]) -> None:
        """Write init_from.json, which lists the tensors loaded from an earlier stage's checkpoint.

        Raises UserError if the file cannot be written.
        """
        with self._writing():
            write_file(self.initial, json_text(account))

    def write_reached(self, reached: dict[str, Any]) -> None:
        """Write reached.json, the outcome of the check train.reach_steps.

        Raises UserError if the file cannot be written.
        """
        with self._writing():
            write_file(self.path / "reached.json", json_text(reached))

    def evaluation_config(self, overrides: Sequence[str]) -> Config:
        """Return the run's recipe, changed so that one process can evaluate the run's newest checkpoint.

        The key run.dir is set to this folder, which may have been moved since training. The key data.neighbours is
        removed, because only training needs it. The overrides are applied last. Raises UserError if the folder holds no
        recipe, or if the changed recipe is invalid.
        """
        own = json.dumps(str(self.path))  # quoted: a name such as 2026 is a text, too
        fixed = ["parallel.expert=1", "run.resume=auto", f"run.dir={own}", "data.neighbours=null"]
        return load_stored_config(self.config, [*fixed, *overrides])

    def write_status(self, state: RunState, step: int, reason: str | None = None, *, restart: bool) -> None:
        """Write status.json (fields: see the module docstring). Raises UserError if the file cannot be written."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        status = {"state": state, "step": step, "reason": reason, "restart": restart, "updated": now}
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.status, json.dumps(status) + "\n")

    def beat(self, step: int) -> None:
        """Rewrite status.json if it is older than BEAT_SECONDS, to show that the run is alive.

        Raises UserError if the file cannot be read or written.
        """
        with self._writing():
            if time.time() - self.status.stat().st_mtime >= BEAT_SECONDS:
                self.write_status("running", step, restart=True)

    def write_end(self, step: int, steps: int, signal: str | None) -> str:
        """Write to status.json that the run is done or was stopped. Return a line that says the same, for printing.

        Raises UserError if the file cannot be written.
        step: the number of steps done. steps: the number of steps after which the run is done.
        signal: name of the signal that stopped the run. If it is None and the run is not done, the recipe's
        train.stop_after stopped it.
        """
        done = step >= steps
        reason = None if done else signal or "train.stop_after"
        self.write_status("done" if done else "stopped", step, reason, restart=not done and signal is not None)
        return f"{'done' if done else f'stopped ({reason})'} after {step} of {steps} steps: {self.path}"

    def write_failure(self, error: BaseException, step: int | None) -> None:
        """Write the error that ended the run to status.json.

        step: the number of steps done, or None if the error occurred during set-up, before `open`.

        After a UserError, the field `restart` is false, because a person must act first. After any other error (a lost
        rank, a bug, a signal during set-up), it is true, because starting again can help. If status.json cannot be
        written, do nothing: the disk may be the cause of the error.

        Set-up does not change the files of an earlier run in the folder. Therefore, after an error during set-up, the
        earlier run's step is kept. If the earlier run was done, status.json is not changed.
        """
        before: dict[str, Any] = {}
        if step is None:
            with suppress(UserError):
                before = read_status(self.path)
        step = before.get("step", 0) if step is None else step
        user_error = as_user_error(error) if isinstance(error, Exception) else None
        reason = str(user_error or error) or type(error).__name__
        state: RunState = "stopped" if isinstance(error, Stopped) else "failed"
        if before.get("state") != "done":
            with suppress(UserError):
                self.write_status(state, step, reason, restart=user_error is None)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise UserError(f"run.dir={self.path} cannot be written: {error.strerror or error}{where}") from error


def read_status(path: str | Path) -> dict[str, Any]:
    """Return the content of RUN/status.json. Raises UserError if the file is missing or damaged."""
    return read_json(RunFolder(Path(path)).status)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _step(line: str) -> float:
    """Return the step of a line of metrics.jsonl, or infinity if a crash left the line incomplete.

    When a run resumes, RunFolder.open removes all lines of later steps. Infinity makes it remove incomplete lines, too.
    """
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")
