"""Initialisation of a training stage from the checkpoint of an earlier stage or from a pretrained model (the recipe's
`init_from`).

Only parameters and buffers are loaded. Parameters are loaded from their float32 masters if there are any. The optimizer
and the schedule start anew. The data start from the beginning, too, unless `data_position` is set.

No tensor is skipped silently. Every tensor of the checkpoint must be loaded or listed in `left_out`. Every tensor of
the model must be loaded or listed in `new`. Otherwise, UserError is raised. An Account records what happened to each
tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint.checkpoint import open_index, read_fragments
from moe_dist.checkpoint.fragments import MASTER, MODEL_KINDS, fragments, kind_of, refresh_working_parameters
from moe_dist.checkpoint.manifest import read_state
from moe_dist.checkpoint.null_gates import check_copies, copies, is_widened
from moe_dist.checkpoint.stage_account import Account, Form, Forms
from moe_dist.checkpoint.storage import Fragment
from moe_dist.config.recipe import InitFrom
from moe_dist.core.errors import UserError
from moe_dist.core.expert_rows import split_row_name
from moe_dist.core.name_patterns import carried_over, compiled, matching
from moe_dist.core.step import ShardedModel
from moe_dist.core.tensor_files import LazyTensor
from moe_dist.parallel.agreement import gather_objects, raise_on_all_ranks
from moe_dist.parallel.layout import Layout


def init_from(
    settings: InitFrom, engine: ShardedModel, layout: Layout, pretrained: Mapping[str, LazyTensor] | None = None
) -> Account:
    """Load the parameters and buffers of a checkpoint into a new engine. Collective.

    Returns an account of what happened to each tensor.
    If `pretrained` is not given, settings.checkpoint must be a checkpoint folder (see manifest.resolve_init). The
    engine may have a different layout from the run that wrote the checkpoint.
    pretrained: tensors to load instead of a checkpoint, keyed by their names in the model. If a parameter stacks
    experts, each expert has its own tensor with the key NAME[expert].
    Raises UserError if a file is damaged or if `match` finds an error. In this case, the engine is not changed. Also
    raises UserError if a pretrained tensor turns out to be damaged when it is read.
    """
    weights = _stored(Path(settings.checkpoint), layout) if pretrained is None else _pretrained(pretrained)
    stored = weights.forms
    wanted = [fragment for fragment in fragments(engine) if kind_of(fragment.name) in MODEL_KINDS]
    of_ranks = gather_objects({fragment.name: (fragment.shape, fragment.tensor.dtype) for fragment in wanted})
    model = {name: form for of_rank in of_ranks for name, form in of_rank.items()}
    account = match(settings, _forms(stored), _forms(model))
    source = {_split(name): name for name in stored}
    plain: list[Fragment] = []
    wide: list[Fragment] = []
    for fragment in wanted:
        name, expert = _split(fragment.name)
        if name in account.loaded:
            of_source = replace(fragment, name=source[account.loaded[name], expert])
            (wide if name in account.widened else plain).append(of_source)
    weights.read(plain)
    shapes = {fragment.name: stored[fragment.name][0] for fragment in wide}
    for number in range(account.copies):
        weights.read(copies(wide, shapes, number))
    refresh_working_parameters(engine)
    return account


@dataclass(frozen=True, slots=True)
class _Weights:
    """Weights that a stage can start from: their shapes and dtypes, and a collective function that reads fragments."""

    forms: Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype, by `kind/name` or `kind/name[expert]`
    read: Callable[[list[Fragment]], None]


def _stored(path: Path, layout: Layout) -> _Weights:
    """Open a checkpoint and return its weights. Collective. Raises UserError if a file is damaged."""
    metadata = open_index(path, layout)
    forms = {
        name: (metadata.planner_data[name], entry.properties.dtype)  # type: ignore[union-attr]
        for name, entry in metadata.state_dict_metadata.items()
        if kind_of(name) in MODEL_KINDS
    }
    return _Weights(forms, partial(read_fragments, path, metadata))


def _pretrained(tensors: Mapping[str, LazyTensor]) -> _Weights:
    named = {f"{MASTER}/{name}": tensor for name, tensor in tensors.items()}
    return _Weights({key: (tensor.shape, tensor.dtype) for key, tensor in named.items()}, partial(_read, named))


@raise_on_all_ranks()
def _read(tensors: Mapping[str, LazyTensor], wanted: list[Fragment]) -> None:
    """Fill the wanted fragments of this rank with values from the tensors.

    Each tensor is read at most once. Only one tensor is in memory at a time.
    """
    by_name = defaultdict(list)
    for fragment in wanted:
        by_name[fragment.name].append(fragment)
    for name, parts in by_name.items():
        values = tensors[name].read().flatten()
        for part in parts:
            part.tensor.copy_(values[part.offset : part.offset + part.tensor.numel()])
        del values  # before the next tensor is read


def loader_state(settings: InitFrom) -> dict[str, Any] | None:
    """Return the loader state stored in the checkpoint, merged across ranks, or None if `data_position` is not set.

    Raises UserError if `data_position` is set but the checkpoint has no loader state.
    """
    if not settings.data_position:
        return None
    state = read_state(settings.checkpoint)
    if not state.get("loader"):
        raise UserError(f"init_from.data_position: {settings.checkpoint} does not say where its run was in the data")
    return state["loader"]


def match(settings: InitFrom, stored: Forms, model: Forms) -> Account:
    """Decide for every tensor whether it is loaded, new or left out. Return an account of this.

    stored, model: the forms (shape, expert ids) of the tensors in the checkpoint and in the model.
    Raises UserError if the settings leave a tensor undecided or contradict each other, or if a tensor to be loaded has
    different forms in the checkpoint and in the model.
    """
    left_out = matching(settings.left_out, stored, key="init_from.left_out", what="parameter of the checkpoint")
    new = matching(settings.new, model, key="init_from.new", what="parameter of the model")
    loaded: dict[str, str] = {}
    for old, name in _renamed(settings.rename, [name for name in stored if name not in left_out]).items():
        if name in loaded:
            raise UserError(f"init_from: the checkpoint's '{loaded[name]}' and '{old}' would both become '{name}'")
        loaded[name] = old
    _check_fates(loaded, new, model)
    widened = [name for name, old in loaded.items() if is_widened(name, stored[old].shape, model[name].shape)]
    for name, old in loaded.items():
        if name in widened and settings.null_gates is not None:
            check_copies(name, stored[old].shape, model[name].shape, settings.null_gates)
        elif name in widened:
            raise UserError(
                f"init_from: the model's '{name}' has rows for null experts that the checkpoint's '{old}' lacks: set "
                "init_from.null_gates to copied or fresh"
            )
        elif stored[old] != model[name]:
            raise UserError(
                f"init_from: the checkpoint's '{old}' is {stored[old]}, the model's '{name}' is {model[name]}"
            )
    return Account(
        settings,
        stored,
        model,
        {name: loaded[name] for name in model if name in loaded},
        [name for name in model if name in new],
        [name for name in stored if name in left_out],
        widened,
    )


def _check_fates(loaded: Mapping[str, str], new: set[str], model: Forms) -> None:
    surplus = [name for name in loaded if name not in model]
    if surplus:
        old, as_what = loaded[surplus[0]], "" if loaded[surplus[0]] == surplus[0] else f" (renamed '{surplus[0]}')"
        raise UserError(
            f"init_from: the model has no place for the checkpoint's '{old}'{as_what}{_more(surplus)}: "
            "rename it, or add it to init_from.left_out"
        )
    twice = [name for name in loaded if name in new]
    if twice:
        raise UserError(
            f"init_from.new counts the model's '{twice[0]}'{_more(twice)}, but the checkpoint would fill it with "
            f"'{loaded[twice[0]]}': add that to init_from.left_out"
        )
    missing = [name for name in model if name not in loaded and name not in new]
    if missing:
        raise UserError(
            f"init_from: the checkpoint has nothing for the model's '{missing[0]}'{_more(missing)}: "
            "rename something to it, or add it to init_from.new"
        )


def _renamed(rename: Mapping[str, str], names: list[str]) -> dict[str, str]:
    """Map each of the checkpoint's names to its new name according to `rename`.

    A name that no pattern matches is kept. Raises UserError if two patterns match the same name.
    """
    matching(rename, names, key="init_from.rename", what="parameter of the checkpoint that is not left out")
    result = {}
    for name in names:
        found = [old for old in rename if compiled(old).fullmatch(name)]
        if len(found) > 1:
            raise UserError(f"init_from.rename: the checkpoint's '{name}' matches both '{found[0]}' and '{found[1]}'")
        result[name] = carried_over(found[0], name, rename[found[0]]) if found else name
    return result


def _forms(logical: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Form]:
    """Return the form of each parameter and buffer, keyed by name.

    logical: the shape and dtype of each logical tensor, keyed by `kind/name`. The rows of a stacked parameter have the
    keys `kind/name[expert]`; together, they make up one form.
    """
    experts = defaultdict(list)
    parts = {}
    for key, (shape, dtype) in logical.items():
        name, expert = _split(key)
        if expert is not None:
            experts[name].append(expert)
        parts[name] = (tuple(shape), dtype.is_floating_point)
    return {
        name: Form(shape, tuple(sorted(experts[name])) if name in experts else None, is_float)
        for name, (shape, is_float) in parts.items()
    }


def _split(logical: str) -> tuple[str, int | None]:
    """Return the name and the global expert id in `kind/name[expert]`. For `kind/name`, the id is None."""
    return split_row_name(logical.split("/", 1)[1])


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
