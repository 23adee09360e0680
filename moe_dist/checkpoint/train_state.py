"""The state of a run that a checkpoint stores as plain JSON, and the recipe keys that may change on resume.

The recipe keys that a resumed run may change are listed in MAY_CHANGE. In addition, train.steps may grow if the
learning rate does not depend on it. Any other change is an error. Data and tokenizers are compared by their paths, so
a moved folder counts as a change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from moe_dist.config.recipe import Config, stored_config
from moe_dist.core.errors import UserError

MAY_CHANGE = (
    "run",
    "eval",
    "telemetry",
    "checkpoint",
    "health",
    "needs",
    "parallel",  # the stored tensors do not depend on it
    "train.stop_after",
    "train.micro_batch_groups",  # selection groups do not depend on how many of them share a forward pass
    "train.non_finite",
    "train.max_skipped",
    "train.reach_steps",
    "train.deterministic",
    "model.recompute",
    "data.validation_shards",
    "data.max_bad_fraction",
    "data.expect",
    "data.neighbours",  # the loader's state identifies the store by its content
    "deepspeed.zero_optimization",
    "deepspeed.wall_clock_breakdown",
    "deepspeed.memory_breakdown",
    "deepspeed.log_level",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """The state of a run between two steps.

    Only `loader` differs between ranks. A checkpoint stores the loader states of all ranks, merged into one.
    """

    step: int  # optimizer steps done, which is the schedule's position
    tokens: int  # number of tokens trained on so far, over all ranks
    loader: dict[str, Any]
    config: dict[str, Any]  # the resolved recipe, including the seed
    vocabulary: str  # fingerprint of the vocabulary

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainState:
        """Build the state from a checkpoint's JSON. Raises UserError if the checkpoint holds only weights."""
        if data.keys() != {field.name for field in fields(cls)}:
            raise UserError("the checkpoint holds only weights, so no run can be resumed from it: use init_from")
        return cls(**data)


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Merge the states of all ranks. Mappings are merged key by key.

    All other values must be equal on all ranks. Raises RuntimeError naming the key of a value that differs.
    """
    merged: dict[str, Any] = {}
    for state in states:
        _merge_into(merged, json.loads(json.dumps(state)), "")
    return merged


def check_resumable(old_config: dict[str, Any], new_config: Config) -> None:
    """Raise UserError if the recipes differ in a key that may not change. The error names the keys and values."""
    old = _leaves(stored_config(old_config, "the checkpoint's configuration").model_dump(mode="json"))
    new = _leaves(new_config.model_dump(mode="json"))
    allowed = (*MAY_CHANGE, "train.steps") if _only_longer(old, new) else MAY_CHANGE
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key) and not _is_of(key, allowed)]
    if changed:
        listed = ", ".join(f"{key} was {_show(old, key)} and is now {_show(new, key)}" for key in changed[:3])
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"cannot resume this checkpoint with another recipe: {listed}{more}")


def _is_of(key: str, sections: Iterable[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _only_longer(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return whether the new recipe only adds steps at the end, without changing the steps that are done.

    This is true if train.steps is not reduced and the learning rate is constant after warm-up.
    """
    constant = new["schedule.end_lr"] == new["schedule.peak_lr"]
    return constant and new["train.steps"] >= old["train.steps"]


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _show(leaves: dict[str, Any], key: str) -> str:
    return json.dumps(leaves[key]) if key in leaves else "not set"


def _merge_into(merged: dict[str, Any], state: dict[str, Any], where: str) -> None:
    for key, value in state.items():
        if isinstance(value, dict) and isinstance(merged.setdefault(key, {}), dict):
            _merge_into(merged[key], value, f"{where}{key}.")
        elif merged.setdefault(key, value) != value:
            raise RuntimeError(f"the ranks' states disagree on '{where}{key}': {merged[key]!r} and {value!r}")
