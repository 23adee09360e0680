"""The progress display on rank 0. It shows the step, the losses, the tokens per second and the time left.

The display is live in a terminal. If the output is a log file, a plain line is printed at intervals instead.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from moe_dist.core.batch import MODALITIES
from moe_dist.metrics.sinks import Metrics

PLAIN_SECONDS = 10.0  # least time between two lines in a log file
WINDOW = 50  # number of updates over which the speed is averaged


class Progress:
    """Context manager around a training loop. It shows the loop's progress if `is_main` is true.

    total: the number of steps of the run, including the steps before the loop.
    step: the number of steps that were completed before the loop.
    causal: the model's `Transformer.causal_routing`. If it is False, the losses are labelled "non-causal".
    """

    def __init__(
        self,
        total: int,
        *,
        step: int = 0,
        is_main: bool,
        causal: bool,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.is_main, self.causal, self.clock = total, is_main, causal, clock
        self.console = console or Console()
        self.marks = deque([(clock(), step)], maxlen=WINDOW)
        self.printed = float("-inf")
        self.held_out: float | None = None
        live = is_main and self.console.is_terminal
        self.live = Live(console=self.console, refresh_per_second=4) if live else None

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def update(self, step: int, metrics: Metrics) -> None:
        """Show the metrics of a step. In a log file, metrics are skipped if the previous line is only seconds old.

        The metrics of the last step, and metrics that include a held-out loss, are never skipped.
        """
        if not self.is_main:
            return
        now = self.clock()
        self.marks.append((now, step))
        self.held_out = metrics.get("eval/loss", self.held_out)
        if self.live:
            self.live.update(self._bar(step, metrics))
        elif now - self.printed >= PLAIN_SECONDS or step == self.total or "eval/loss" in metrics:
            self.printed = now
            self.console.print(self.line(step, metrics), markup=False, highlight=False, soft_wrap=True)

    def line(self, step: int, metrics: Metrics) -> str:
        parts = [f"step {step}/{self.total}", *self._losses(metrics)]
        if "moe/flops_saved" in metrics:
            parts.append(f"{metrics['moe/experts_per_token']:.2f} true experts/token")
            parts.append(f"{metrics['moe/flops_saved']:.1%} FLOPs saved")
        if "tokens_per_second" in metrics:
            parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        return " | ".join([*parts, f"ETA {self._eta(step)}"])

    def _losses(self, metrics: Metrics) -> list[str]:
        label = "" if self.causal else "non-causal "
        parts = []
        if "loss" in metrics:
            split = [f"{name} {metrics[f'loss/{name}']:.3f}" for name in MODALITIES if f"loss/{name}" in metrics]
            parts.append(f"{label}loss {metrics['loss']:.3f}" + (f" ({', '.join(split)})" if split else ""))
        if self.held_out is not None:
            parts.append(f"held-out {label}loss {self.held_out:.3f}")
        return parts

    def _eta(self, step: int) -> str:
        (first_time, first_step), (last_time, last_step) = self.marks[0], self.marks[-1]
        if last_step == first_step:
            return "?"
        seconds = (self.total - step) * (last_time - first_time) / (last_step - first_step)
        return str(timedelta(seconds=round(seconds)))

    def _bar(self, step: int, metrics: Metrics) -> Table:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=self.total, completed=step, width=20), self.line(step, metrics))
        return grid
