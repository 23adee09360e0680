"""The table of renamed recipe keys (also in CHANGELOG.md), and functions that find and replace the old keys."""

from __future__ import annotations

import copy
from typing import Any

from moe_dist.core.errors import UserError

RENAMED = {
    "deepspeed.optimizer.params.lr": "schedule.peak_lr",
    "model.attention_lora": "model.lora",  # whose targets are attention.* by default
}


def check_names(data: dict[str, Any], where: str) -> None:
    """Raise UserError if a recipe uses old keys. The message begins with `where` and gives the new keys."""
    found = [f"key '{old}' is now '{new}'" for old, new in RENAMED.items() if _section(data, old) is not None]
    if found:
        raise UserError(f"{where}: {'; '.join(found)}")


def with_new_names(data: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `data` in which old keys are renamed to the new keys.

    data: a recipe that an earlier version stored in a checkpoint or a run folder.
    """
    data = copy.deepcopy(data)
    for old, new in RENAMED.items():
        if (section := _section(data, old)) is not None:
            value = section.pop(old.rpartition(".")[2])
            target = data
            *parents, last = new.split(".")
            for parent in parents:
                target = target.setdefault(parent, {})
            target.setdefault(last, value)
    return data


def _section(data: Any, key: str) -> dict[str, Any] | None:
    """Return the mapping that directly contains the last part of a dotted key, or None if `data` lacks the key."""
    *parents, last = key.split(".")
    for parent in parents:
        data = data.get(parent) if isinstance(data, dict) else None
    return data if isinstance(data, dict) and last in data else None
