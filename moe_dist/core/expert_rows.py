"""Stacked expert parameters: which global expert each row belongs to, and the names of single rows.

A rank holds the parameters of its experts stacked, one row an expert. The rows have names that do not depend on the
layout, NAME[global expert id]. This file alone knows that the ids are an attribute of the parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from torch import Tensor

_ATTRIBUTE = "expert_ids"
_ROW = re.compile(r"(.*)\[(\d+)\]")


def set_expert_ids(parameter: Tensor, expert_ids: Sequence[int]) -> None:
    """Declare a parameter stacked: its row i belongs to the global expert expert_ids[i]."""
    setattr(parameter, _ATTRIBUTE, tuple(expert_ids))


def expert_ids(parameter: Tensor) -> tuple[int, ...] | None:
    """Return the global expert of each row; None for a parameter that is not stacked."""
    return getattr(parameter, _ATTRIBUTE, None)


def is_stacked(parameter: Tensor) -> bool:
    """Return whether each row of the parameter belongs to an expert."""
    return expert_ids(parameter) is not None


def row_name(name: str, expert: int) -> str:
    """Return the name of one expert's row."""
    return f"{name}[{expert}]"


def split_row_name(name: str) -> tuple[str, int | None]:
    """Invert row_name: the parameter's name and the global expert, None for the name of a whole parameter."""
    found = _ROW.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


def named_rows(name: str, parameter: Tensor) -> dict[str, Tensor]:
    """Return the rows of a stacked parameter by their names; of any other the parameter itself."""
    ids = expert_ids(parameter)
    return {name: parameter} if ids is None else {row_name(name, e): row for e, row in zip(ids, parameter)}


def rows_between(ids: Sequence[int], shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, slice]]:
    """Cut elements [start, stop) of a flattened stacked parameter of this shape into its rows.

    Yields for every row touched: its global expert, the first element within the row, and the slice of the elements
    counted from `start`.
    """
    size = math.prod(shape[1:])
    for row, expert in enumerate(ids):
        first, last = max(start, row * size), min(stop, (row + 1) * size)
        if first < last:
            yield expert, first - row * size, slice(first - start, last - start)
