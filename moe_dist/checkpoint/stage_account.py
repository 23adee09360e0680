"""The account of a stage's start: what happened to every tensor of the checkpoint and of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from moe_dist.config.recipe import InitFrom


@dataclass(frozen=True, slots=True)
class Form:
    """The properties of a parameter or buffer that must be the same in the checkpoint and in the model.

    The precision may differ.
    experts: the global ids of the experts in a stacked parameter, or None if the parameter or buffer is not stacked.
    shape: for a stacked parameter, the shape of one expert's row.
    """

    shape: tuple[int, ...]
    experts: tuple[int, ...] | None
    is_float: bool

    @property
    def full_shape(self) -> list[int]:
        return [*([] if self.experts is None else [len(self.experts)]), *self.shape]

    def __str__(self) -> str:
        experts = "" if self.experts is None else f"{len(self.experts)} experts of "
        return f"{experts}{list(self.shape)}{'' if self.is_float else ' (integers)'}"


Forms = Mapping[str, Form]  # by name, without kind and expert


@dataclass(frozen=True, slots=True)
class Account:
    """A list of all tensors of a checkpoint and a model, with the fate of each: loaded, new or left out."""

    settings: InitFrom
    stored: Forms
    model: Forms
    loaded: dict[str, str]  # the model's name -> the checkpoint's
    new: list[str]  # the model's names
    left_out: list[str]  # the checkpoint's names
    widened: list[str]  # the model's names of loaded gates that have additional rows for null experts
    dropped: tuple[str, ...] = ()  # superfluous files and tensors of a Hugging Face folder, each with the reason

    @property
    def copies(self) -> int:
        """The number of times that a stored gate is copied into the widened gate; 0 if no gate is widened.

        The first copy fills the rows of the true experts. Any further copies fill the rows of the null experts. If the
        gates need different numbers of copies, this is the highest number.
        """
        if self.settings.null_gates == "fresh":
            return min(1, len(self.widened))
        rows = ((self.model[name].shape[0], self.stored[self.loaded[name]].shape[0]) for name in self.widened)
        return max((mine // theirs for mine, theirs in rows), default=0)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serializable account of the loaded, the new and the left-out tensors.

        For each of these three groups, it gives the number of tensors, their total number of parameters, and the name
        and shape of each tensor. The shape of a stacked parameter includes the number of experts.
        """
        return {
            "init_from": self.settings.model_dump(mode="json"),
            "loaded": _listed(
                {"name": name, "from": old, "shape": self.model[name].full_shape} for name, old in self.loaded.items()
            ),
            "new": _listed({"name": name, "shape": self.model[name].full_shape} for name in self.new),
            "left_out": _listed({"name": name, "shape": self.stored[name].full_shape} for name in self.left_out),
            "widened": self.widened,
            "dropped": list(self.dropped),
        }

    def table(self) -> Table:
        """Return a printable table that counts the loaded, the new and the left-out tensors and their parameters."""
        renamed = sum(name != old for name, old in self.loaded.items())
        notes = {
            "loaded": ", ".join(
                [f"{renamed} renamed"] * bool(renamed)
                + [f"{len(self.widened)} gates with {self.settings.null_gates} null rows"] * bool(self.widened)
            ),
            "new": ", ".join(self.settings.new),
            "left_out": ", ".join(self.settings.left_out),
        }
        table = Table(
            *("", "tensors", "parameters", ""), title=f"init_from {self.settings.checkpoint}", title_justify="left"
        )
        for fate, counted in self.to_json().items():
            if fate in notes:
                table.add_row(fate, f"{counted['tensors']:,}", f"{counted['parameters']:,}", notes[fate])
        for dropped in self.dropped:
            table.add_row("not used", "", "", dropped)
        return table


def _listed(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    entries = [{**entry, "parameters": math.prod(entry["shape"])} for entry in entries]
    return {"tensors": len(entries), "parameters": sum(e["parameters"] for e in entries), "entries": entries}
