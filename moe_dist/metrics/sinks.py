"""Metric sinks, which write the metrics of a run to metrics.jsonl and, if the recipe says so, to TensorBoard and W&B.

The metric keys are in metrics/metric_keys.py. The file metrics.jsonl is the record of a run: if it cannot be written,
the run ends. Non-finite numbers are written to it as null. TensorBoard and W&B are optional: if one of them fails, a
warning is printed and no more metrics are sent to it.
"""

from __future__ import annotations

import json
import math
import sys
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from moe_dist.config.recipe import Config
from moe_dist.core.errors import UserError
from moe_dist.core.extras import require_extra
from moe_dist.metrics.run_folder import RunFolder

Metrics = Mapping[str, Any]  # key -> number, or list of numbers with one entry per expert


class Sink(Protocol):
    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class JSONLines:
    """Sink that appends one JSON object per step to metrics.jsonl and flushes it.

    Non-finite values are written as null.
    """

    def __init__(self, folder: RunFolder, *, causal: bool):
        self.path, self.causal = folder.metrics, causal
        self.file = self._try(lambda: self.path.open("a", encoding="utf-8"))

    def log(self, step: int, metrics: Metrics) -> None:
        line = {"step": step, "causal": self.causal, **{key: _finite(value) for key, value in metrics.items()}}
        self._try(lambda: (self.file.write(json.dumps(line, allow_nan=False) + "\n"), self.file.flush()))

    def close(self) -> None:
        self._try(self.file.close)

    def _try(self, action):
        try:
            return action()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error


class TensorBoard:
    """Sink that writes TensorBoard event files.

    The event files of a non-causal run are in a subfolder `non-causal`. TensorBoard displays this name, so the losses
    are not mistaken for those of a causal run.
    """

    def __init__(self, folder: RunFolder, *, causal: bool, step: int):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        directory = folder.tensorboard if causal else folder.tensorboard / "non-causal"
        self.writer = SummaryWriter(str(directory), purge_step=step + 1)  # hide an earlier run's steps

    def log(self, step: int, metrics: Metrics) -> None:
        for key, value in _scalars(metrics).items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Sink that sends metrics to Weights & Biases.

    The id of the W&B run is stored in RUN/wandb_id, so a resumed run continues the same W&B run.
    """

    def __init__(self, folder: RunFolder, config: Config, *, causal: bool, step: int):
        import wandb

        id_file = folder.path / "wandb_id"
        if step == 0 or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self.run = wandb.init(
            project=config.telemetry.wandb_project,
            name=folder.path.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(folder.path),
            config=config.model_dump(mode="json"),
            tags=[] if causal else ["non-causal"],
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log(_scalars(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class Sinks:
    """All sinks of a run: metrics.jsonl and those that `config.telemetry` selects. Only rank 0 has sinks.

    The run folder must be open already (RunFolder.open). Raises UserError on every rank if a selected sink needs a
    package that is not installed.
    causal: the model's `Transformer.causal_routing`. The sinks record it.
    step: the number of optimizer steps done when the run starts.
    """

    def __init__(self, folder: RunFolder, config: Config, *, is_main: bool, causal: bool, step: int = 0):
        project = config.telemetry.wandb_project
        if project:
            require_extra("wandb", "wandb", f"telemetry.wandb_project={project}")
        if config.telemetry.tensorboard:
            require_extra("tensorboard", "report", "telemetry.tensorboard=true")
        self.sinks: list[Sink] = [JSONLines(folder, causal=causal)] if is_main else []
        if is_main and config.telemetry.tensorboard:
            self._add("TensorBoard", lambda: TensorBoard(folder, causal=causal, step=step))
        if is_main and project:
            self._add("W&B", lambda: WandB(folder, config, causal=causal, step=step))

    def log(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of a step to every sink. The keys are defined in metrics/metric_keys.py."""
        for sink in list(self.sinks):
            self._call(sink, lambda sink=sink: sink.log(step, metrics))

    def close(self) -> None:
        for sink in list(self.sinks):
            self._call(sink, sink.close)

    def _add(self, name: str, build) -> None:
        try:
            self.sinks.append(build())
        except Exception as error:  # a third-party library may raise anything; training continues
            _warn(name, error)

    def _call(self, sink: Sink, action) -> None:
        try:
            action()
        except UserError:
            raise
        except Exception as error:
            self.sinks.remove(sink)
            _warn(type(sink).__name__, error)


def _warn(name: str, error: Exception) -> None:
    print(f"warning: {name} failed and is disabled from now on: {error}", file=sys.stderr, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(metrics: Metrics) -> dict[str, float]:
    """Replace each list with one scalar per entry. A scalar's key ends with its index, such as moe/0/utilization/3."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, list | tuple):
            flat |= {f"{key}/{i}": item for i, item in enumerate(value)}
        else:
            flat[key] = value
    return flat
