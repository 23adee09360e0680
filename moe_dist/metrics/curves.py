"""Plots of runs, drawn from metrics.jsonl: losses, routing over time, and which experts receive each domain's tokens.

The losses of several runs can be overlaid in one plot. Losses are in nats per predicted token. The losses of a run
whose routing sees later tokens (expert choice) are labelled non-causal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_dist.core.batch import MODALITIES
from moe_dist.core.errors import UserError
from moe_dist.core.extras import MissingExtra, require_extra
from moe_dist.metrics.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b6fa4", "#d1495b", "#3d8b5f", "#8a5fa8", "#c98a1b", "#5b6770")
MODALITY_COLOURS = dict(zip(MODALITIES, COLOURS, strict=False))
MAX_COLUMNS = 300  # largest number of heat map columns; longer runs are averaged


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """One run's metrics: the lines of metrics.jsonl, in order."""

    name: str
    lines: tuple[dict[str, Any], ...]

    @property
    def causal(self) -> bool:
        return all(line.get("causal", True) for line in self.lines)

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for line in self.lines for key in line))

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the token counts and the values of `key`, from all lines that contain `key`.

        If the values are lists, the second array has one row per line.
        """
        pairs = [(line["tokens"], line[key]) for line in self.lines if line.get(key) is not None]
        tokens, values = zip(*pairs) if pairs else ((), ())
        return np.array(tokens, dtype=float), np.array(values, dtype=float)


def read_run(path: str | Path) -> RunMetrics:
    """Read a run folder's metrics. Raises UserError if metrics.jsonl is missing or damaged, or contains no loss."""
    folder = RunFolder(Path(path))
    if not folder.metrics.is_file():
        raise UserError(f"{path} is not a run folder: there is no {folder.metrics}")
    lines = []
    for number, text in enumerate(folder.metrics.read_text().splitlines(keepends=True), 1):
        try:
            line = json.loads(text)
            line["tokens"]
        except (ValueError, TypeError, KeyError):
            if text.endswith("\n"):
                raise UserError(f"{folder.metrics} line {number} is not a line of metrics with a token count") from None
            continue  # an unfinished last line: the run is writing it now
        lines.append(line)
    if not any(line.get("loss") is not None for line in lines):
        raise UserError(f"{folder.metrics} holds no loss yet: the run has not finished a step")
    return RunMetrics(folder.path.resolve().name, tuple(lines))


def read_baseline(path: str | Path) -> dict[str, float]:
    """Read losses from a JSON file like {"text": 4.1, "image": 5.8}. Raises UserError if it is missing or invalid."""
    try:
        baseline = json.loads(Path(path).read_text())
        return {modality: float(baseline[modality]) for modality in MODALITIES if modality in baseline}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f'{path} is not a JSON file of losses like {{"text": 4.1}}: {error}') from None


def write_report(path: str | Path, baseline: Mapping[str, float] | None = None) -> list[Path]:
    """Plot loss.png, routing.png (if the run has experts) and domains.png (if its data have domains) in a run folder.

    path: the run folder. baseline: losses to draw as lines in loss.png. Returns the paths of the plots. Raises
    UserError if metrics.jsonl cannot be read or a plot cannot be drawn or written.
    """
    run = read_run(path)
    figures = {"loss.png": loss_figure([run], baseline or {})}
    if any(key.endswith("/utilization") for key in run.keys):
        figures["routing.png"] = routing_figure(run)
    if any("/domain_share/" in key for key in run.keys):
        figures["domains.png"] = domain_figure(run)
    files = [Path(path) / name for name in figures]
    for file, figure in zip(files, figures.values(), strict=True):
        save_figure(figure, file)
    return files


def report_or_explain(path: str | Path) -> None:
    """Call write_report. If matplotlib is not installed, catch the error and print which extra installs it."""
    try:
        write_report(path)
    except MissingExtra as error:
        print(f"no pictures of {path}: {error}", flush=True)


def save_figure(figure: Figure, file: Path) -> None:
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from error


def make_figure(width: float, height: float) -> Figure:
    require_extra("matplotlib", "report", "drawing curves")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def loss_figure(runs: Sequence[RunMetrics], baseline: Mapping[str, float]) -> Figure:
    """Plot the losses over all tokens, over text and over images, each in its own panel.

    A panel shows the training loss (raw and smoothed), the held-out losses as points and the bigram baseline as a line.
    """
    parts = [part for part in ("", *MODALITIES) if any(run.series(_key("loss", part))[0].size for run in runs)]
    figure = make_figure(1.2 + 4.4 * len(parts), 4.6)
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for axis, part in zip(axes, parts, strict=True):
        for i, run in enumerate(runs):
            colour = COLOURS[i % len(COLOURS)] if len(runs) > 1 else MODALITY_COLOURS.get(part, COLOURS[-1])
            _draw_losses(axis, run, part, colour, named=len(runs) > 1)
        if part in baseline:
            _draw_bigram(axis, baseline[part], "#333333")
        _style(axis, part or "all tokens")
    non_causal = [run.name for run in runs if not run.causal]
    note = ", non-causal (expert choice)" if len(non_causal) == len(runs) else ""
    axes[0].set_ylabel(f"loss, nats/token{note}")
    title = " · ".join(run.name for run in runs)
    if non_causal:
        title += "\nnon-causal losses: expert choice lets routing see later tokens"
    figure.suptitle(title, fontsize=11)
    return figure


def routing_figure(run: RunMetrics) -> Figure:
    """Plot a heat map of each layer's expert utilization over time, and curves of unrouted tokens and rank imbalance.

    If every utilization is nearly 1, as with expert choice, the title says so and the heat map is left out.
    """
    loads = {key.split("/")[1]: run.series(key) for key in run.keys if key.endswith("/utilization")}
    even = all(np.nanmax(np.abs(load - 1), initial=0) < 0.01 for _, load in loads.values())
    figure = make_figure(10, 3.2 if even else 7.2)
    if even:
        unrouted, imbalance = figure.subplots(1, 2)
    else:
        heat, (unrouted, imbalance) = _routing_axes(figure)
        _draw_utilization(figure, heat, loads)
    _draw_unrouted(unrouted, run)
    tokens, values = run.series("moe/rank_imbalance")
    imbalance.plot(tokens, values, color=COLOURS[-1], alpha=0.25, linewidth=0.8)
    imbalance.plot(tokens, _smooth(values), color=COLOURS[-1], linewidth=1.6)
    _style(imbalance, "rows of the busiest rank / mean, worst layer")
    imbalance.set_ylim(bottom=1)
    note = "; every expert has its fair share in every layer" if even else ""
    figure.suptitle(f"{run.name}: routing{note}", fontsize=11)
    return figure


def domain_figure(run: RunMetrics) -> Figure:
    """Plot one heat map per layer, with domains as rows and experts as columns.

    A cell shows the fraction of the domain's assignments that go to the expert (mean over the last tenth of the run).
    """
    keys = [key for key in run.keys if "/domain_share/" in key]
    layers = sorted({int(key.split("/", 3)[1]) for key in keys})
    domains = sorted({key.split("/", 3)[3] for key in keys})
    shares = {key: _mean(values[-max(1, len(values) // 10) :]) for key in keys for _, values in [run.series(key)]}
    experts = len(next(iter(shares.values())))
    unknown = np.full(experts, np.nan)
    columns = min(len(layers), max(1, 24 // max(experts, 6)))
    rows = -(-len(layers) // columns)
    size = (1.5 + columns * max(2.4, 0.4 * experts), 0.8 + rows * (0.9 + 0.35 * len(domains)))
    figure = make_figure(*size)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, layer in zip(axes.flat, layers):
        table = np.stack([shares.get(f"moe/{layer}/domain_share/{domain}", unknown) for domain in domains])
        image = axis.imshow(table, vmin=0, vmax=max(map(np.nanmax, shares.values())), cmap="Blues", aspect="auto")
        axis.set_title(f"layer {layer}", fontsize=10)
        axis.set_xticks(range(0, experts, -(-experts // 16)))
        axis.set_yticks(range(len(domains)), domains if axis in axes[:, 0] else [""] * len(domains), fontsize=8)
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("expert")
    figure.colorbar(image, ax=axes, pad=0.01)
    title = f"{run.name}: share of each domain's assignments per expert (even: {1 / experts:.2g})"
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_losses(axis: Axes, run: RunMetrics, part: str, colour: str, *, named: bool) -> None:
    who = run.name + ("" if run.causal else " (non-causal)") if named else ""
    tokens, losses = run.series(_key("loss", part))
    axis.plot(tokens, losses, color=colour, alpha=0.22, linewidth=0.8)
    axis.plot(tokens, _smooth(losses), color=colour, linewidth=1.8, label=who or "training, smoothed")
    tokens, losses = run.series(_key("eval/loss", part))
    if tokens.size:
        label = f"held-out, {losses[-1]:.2f}"
        axis.plot(tokens, losses, "o", color=colour, markeredgecolor="white", label=label, zorder=3)
    _, bigram = run.series(f"eval/bigram/{part}")
    if bigram.size:
        _draw_bigram(axis, bigram[-1], colour)


def _draw_bigram(axis: Axes, loss: float, colour: str) -> None:
    axis.axhline(loss, color=colour, linestyle="--", linewidth=1.1, label=f"bigram baseline, {loss:.2f}")


def _draw_unrouted(axis: Axes, run: RunMetrics) -> None:
    for modality in MODALITIES:
        keys = [key for key in run.keys if key.endswith(f"/unrouted_fraction/{modality}")]
        for i, key in enumerate(keys):
            tokens, values = run.series(key)
            shade = 0.35 + 0.65 * (i + 1) / len(keys)
            label = f"{modality}, last layer" if i == len(keys) - 1 else None
            colour = MODALITY_COLOURS[modality]
            axis.plot(tokens, _smooth(values), color=colour, alpha=shade, linewidth=1.3, label=label)
    _style(axis, "valid tokens without an expert (darker: deeper layer)")
    axis.set_ylabel("share")
    axis.set_ylim(bottom=0)


def _routing_axes(figure: Figure) -> tuple[Axes, tuple[Axes, Axes]]:
    grid = figure.add_gridspec(2, 2, height_ratios=[1.7, 1])
    return figure.add_subplot(grid[0, :]), (figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1]))


def _draw_utilization(figure: Figure, axis: Axes, loads: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    from matplotlib.colors import LogNorm

    blocks, ticks, names, edges = [], [], [], []
    row = 0
    for layer, (tokens, load) in loads.items():  # load: [moments, experts]
        cuts = np.linspace(0, len(tokens), min(len(tokens), MAX_COLUMNS) + 1).astype(int)
        blocks.append(np.stack([_mean(load[a:b]) for a, b in pairwise(cuts)], axis=1))
        ticks.append(row + blocks[-1].shape[0] / 2)
        names.append(f"layer {layer}")
        row += blocks[-1].shape[0]
        edges.append(row)
    image = axis.imshow(
        np.concatenate(blocks).clip(0.25, 4),
        norm=LogNorm(0.25, 4),
        cmap="RdBu_r",
        aspect="auto",
        interpolation="auto",
        extent=(0, tokens[-1], row, 0),
    )
    axis.hlines(edges[:-1], 0, tokens[-1], color="black", linewidth=0.6)
    _style(axis, "expert utilization: load over fair share, one row per expert", legend=False)
    axis.grid(False)
    every = -(-len(ticks) // 16)
    axis.set_yticks(ticks[::every], names[::every])
    bar = figure.colorbar(image, ax=axis, pad=0.01, ticks=[0.25, 0.5, 1, 2, 4])
    bar.ax.set_yticklabels(["≤ 1/4", "1/2", "1 (even)", "2", "≥ 4"])
    bar.ax.minorticks_off()


def _style(axis: Axes, title: str, *, legend: bool = True) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_title(title, fontsize=10)
    axis.set_xlabel("training tokens")
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False)


def _key(name: str, part: str) -> str:
    return f"{name}/{part}" if part else name


def _mean(rows: np.ndarray) -> np.ndarray:
    """Return the mean of each column, ignoring nan entries. The mean of a column with only nan entries is nan."""
    known = ~np.isnan(rows)
    return np.where(known, rows, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return a centred moving average. The window is about 4 % of the run, and shorter at the ends of the run."""
    window = np.hanning(max(1, len(values) // 25) + 2)[1:-1]
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
