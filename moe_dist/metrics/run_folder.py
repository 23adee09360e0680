"""The folder of a run: config.yaml, init_from.json, metrics.jsonl, status.json, checkpoints/, tensorboard/, samples/;
health.json and stacks/ from the checks of the ranks; job.json and logs/ from a scheduler (docs/slurm.md).

Only rank 0 writes. Whatever is rewritten is replaced atomically, so a reader never sees half a file.

status.json is the truth about how a run ended, since launchers may exit with 0 after a signal or a failure:
    state     running | done | stopped (there is more to train) | failed
    step      optimizer steps done
    reason    why it stopped (a signal's name, or the recipe's train.stop_after) or failed; else null
    restart   whether starting again, with nothing changed, can help: what a scheduler needs to know
    updated   when this was written, UTC
A run that was killed says `running` for ever. Who reads that after its launcher has returned knows it was killed, and
`restart` is true; anybody else looks at `updated`, which a run that trains renews with its logged steps (`beat`).
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

from moe_dist.config.recipe import Config, load_config, save_config
from moe_dist.core.errors import UserError, as_user_error
from moe_dist.core.files import json_text, new_file, read_json, write_file
from moe_dist.parallel.signals import Stopped

BEAT_SECONDS = 10.0  # status.json of a run that trains is renewed no more often than this

State = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where the parts of a run lie. Every rank may hold one; `open` and `write_status` are for rank 0."""

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
        """Make the folder ready for a run that starts after `step` steps. Raises UserError where it cannot be written.

        metrics.jsonl keeps its lines up to `step`, so that a resumed curve has no step twice; a fresh start (step 0)
        keeps the file of the run before as metrics.previous.jsonl.
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
        """Keep what the ranks said of themselves before training. Raises UserError."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.path / "health.json", json_text(health))

    def write_initial(self, account: dict[str, Any]) -> None:
        """Keep what a run started from (init_from). Raises UserError."""
        with self._writing():
            write_file(self.initial, json_text(account))

    def evaluation_config(self, overrides: Sequence[str]) -> Config:
        """The run's recipe, to look at its newest checkpoint: on one process unless overridden, by any name of the
        folder, without what only training reads. Raises UserError."""
        fixed = ["parallel.expert=1", "run.resume=auto", f"run.dir={self.path}", "data.neighbours=null"]
        return load_config(self.config, [*fixed, *overrides])

    def write_status(self, state: State, step: int, reason: str | None = None, *, restart: bool) -> None:
        """Say how the run stands, see the top of this file. Raises UserError."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        status = {"state": state, "step": step, "reason": reason, "restart": restart, "updated": now}
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.status, json.dumps(status) + "\n")

    def beat(self, step: int) -> None:
        """Show that the run lives, now and then. Raises UserError."""
        with self._writing():
            if time.time() - self.status.stat().st_mtime >= BEAT_SECONDS:
                self.write_status("running", step, restart=True)

    def write_end(self, step: int, steps: int, signal: str | None) -> str:
        """Say that a run is done, or stopped by a signal or else by its recipe; the line to print. Raises UserError."""
        done = step >= steps
        reason = None if done else signal or "train.stop_after"
        self.write_status("done" if done else "stopped", step, reason, restart=not done and signal is not None)
        return f"{'done' if done else f'stopped ({reason})'} after {step} of {steps} steps: {self.path}"

    def write_failure(self, error: BaseException, step: int | None) -> None:
        """Say what has ended a run before its last step. step None: while it was set up, before `open`.

        A UserError needs a person first; after anything else (a lost rank, a defect, a signal in the set-up) starting
        again can help. The set-up has changed nothing of an earlier run in the folder: that one's step stays, and a run
        that was done still is. Best effort, since what has ended the run may be the disk.
        """
        before: dict[str, Any] = {}
        if step is None:
            with suppress(UserError):
                before = read_status(self.path)
        step = before.get("step", 0) if step is None else step
        user_error = as_user_error(error) if isinstance(error, Exception) else None
        reason = str(user_error or error) or type(error).__name__
        state: State = "stopped" if isinstance(error, Stopped) else "failed"
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
    """The content of RUN/status.json. Raises UserError where there is none."""
    return read_json(RunFolder(Path(path)).status)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _step(line: str) -> float:
    """Step of a metrics line; infinite for what a crash left of one, so that it is cut away."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")
