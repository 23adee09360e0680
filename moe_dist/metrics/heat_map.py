"""A heat map of a small table, with the value printed in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_dist.metrics.curves import make_figure, save_figure


def draw_heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[object],
    columns: Sequence[object],
    path: Path,
    *,
    title: str,
    row_label: str,
) -> None:
    """Draw a table of numbers as a picture. `rows` and `columns` are the labels.

    Raises MissingExtra if matplotlib is not installed, and UserError if the file cannot be written.
    """
    figure = make_figure(2 + 0.9 * len(columns), 1.6 + 0.3 * len(rows))
    axis = figure.subplots()
    axis.imshow(values, aspect="auto", cmap="viridis")
    cells = [value for row in values for value in row]
    middle = (min(cells) + max(cells)) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "white" if value < middle else "black"
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(columns)), labels=[str(name) for name in columns], rotation=20, ha="right")
    axis.set_yticks(range(len(rows)), labels=[str(name) for name in rows])
    axis.set_ylabel(row_label)
    axis.set_title(title, loc="left")
    save_figure(figure, path)
