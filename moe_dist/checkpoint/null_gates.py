"""Gates that become wider when a stage starts from a model without null experts (AdaMoE, arXiv 2406.13233).

A router's gate has one row per true expert, then one row per null expert. The rows of the true experts are loaded. With
`init_from.null_gates: copied`, the loaded rows are repeated, in order, until every null expert has a row. With `fresh`,
the rows of the null experts keep their own initial values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from moe_dist.checkpoint.storage import Fragment
from moe_dist.core.errors import UserError

ROUTER_GATE = ".router.gate.weight"


def check_copies(name: str, stored: tuple[int, ...], model: tuple[int, ...], null_gates: str) -> None:
    """Raise UserError if null_gates is `copied` but the number of null rows is not a multiple of that of true rows."""
    nulls = model[0] - stored[0]
    if null_gates == "copied" and nulls % stored[0]:
        raise UserError(
            f"init_from.null_gates=copied: the {nulls} null experts of '{name}' are not a multiple of its {stored[0]} "
            "true experts: change num_null_experts, or use null_gates=fresh"
        )


def is_widened(name: str, stored: tuple[int, ...], model: tuple[int, ...]) -> bool:
    """Return whether a parameter is a gate with more rows in the model than in the checkpoint."""
    return name.endswith(ROUTER_GATE) and len(stored) == 2 and stored[1:] == model[1:] and stored[0] < model[0]


def copies(fragments: Iterable[Fragment], stored: Mapping[str, tuple[int, ...]], number: int) -> list[Fragment]:
    """Return the parts of the widened gates that copy `number` of the stored gates fills.

    A widened gate has room for several copies of the stored gate. Copy 0 fills the rows of the true experts, and the
    other copies fill the rows of the null experts. A returned Fragment has the stored gate's shape, and its offset is a
    position in the stored gate. The caller can therefore load the Fragment from the checkpoint.

    fragments: the fragments of the widened gates.
    stored: the shapes of the stored gates, keyed by name.
    """
    found = []
    for fragment in fragments:
        shape = stored[fragment.name]
        size = math.prod(shape)
        start, end = max(fragment.offset, number * size), min(fragment.offset + fragment.numel, (number + 1) * size)
        if start < end:
            part = fragment.tensor[start - fragment.offset : end - fragment.offset]
            found.append(replace(fragment, shape=shape, offset=start - number * size, tensor=part))
    return found
