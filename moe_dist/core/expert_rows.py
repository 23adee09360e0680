"""Stacked expert parameters: the global expert of each row, and the names of single rows.

A rank stacks the parameters of its experts, one row per expert. The name of a row is NAME[global expert id], which does
not depend on the layout. Only this module accesses the attribute that stores the expert ids of a parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from torch import Tensor

_ATTRIBUTE = "expert_ids"
_ROW = re.compile(r"(.*)\[(\d+)\]")


def set_expert_ids(parameter: Tensor, expert_ids: Sequence[int]) -> None:
    """Mark a parameter as stacked: its row i belongs to the global expert expert_ids[i]."""
    setattr(parameter, _ATTRIBUTE, tuple(expert_ids))


def expert_ids(parameter: Tensor) -> tuple[int, ...] | None:
    """Return the global expert id of each row, or None if the parameter is not stacked."""
    return getattr(parameter, _ATTRIBUTE, None)


def is_stacked(parameter: Tensor) -> bool:
    """Return True if the parameter is stacked, that is, if each of its rows belongs to an expert."""
    return expert_ids(parameter) is not None


def row_name(name: str, expert: int) -> str:
    """Return the name of one expert's row in the stacked parameter `name`."""
    return f"{name}[{expert}]"


def split_row_name(name: str) -> tuple[str, int | None]:
    """Split the name of a row into the parameter's name and the global expert id.

    If `name` is the name of a whole parameter, return (name, None).
    """
    found = _ROW.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


def named_rows(name: str, parameter: Tensor) -> dict[str, Tensor]:
    """Return the rows of a stacked parameter, keyed by row name.

    If the parameter is not stacked, return the whole parameter, keyed by `name`.
    """
    ids = expert_ids(parameter)
    return {name: parameter} if ids is None else {row_name(name, e): row for e, row in zip(ids, parameter)}


def rows_between(ids: Sequence[int], shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, slice]]:
    """Divide the elements [start, stop) of a flattened stacked parameter into pieces, one per row.

    ids: the global expert id of each row. shape: the shape of the parameter.
    Yields (expert, first, part) for each row that has elements in the range. `expert` is the row's global expert id.
    `first` is the position in the row at which the piece begins. `part` is the piece's slice of the range.
    """
    size = math.prod(shape[1:])
    for row, expert in enumerate(ids):
        first, last = max(start, row * size), min(stop, (row + 1) * size)
        if first < last:
            yield expert, first - row * size, slice(first - start, last - start)
