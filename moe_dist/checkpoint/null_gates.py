"""Gates that become wider when a stage starts from a model without null experts (AdaMoE, arXiv 2406.13233).

A router's gate has one row per true expert, then one row per null expert. The rows of the true experts are loaded. With
`init_from.null_gates: copied`, the rows of the null experts are copies of them, in the same order and as often as
needed. With `fresh`, they keep their own initial values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from moe_dist.checkpoint.storage import Fragment
from moe_dist.core.errors import UserError

ROUTER_GATE = ".router.gate.weight"


def check_copies(name: str, stored: tuple[int, ...], model: tuple[int, ...], null_gates: str) -> None:
    """Raise UserError if the gate's null rows cannot be whole copies of its true rows, as `copied` requires."""
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
    """Return the parts of the widened gates that are filled from copy `number` of the stored gates.

    A widened gate consists of several copies of a stored gate. Copy 0 fills the rows of the true experts, and the other
    copies fill those of the null experts. The shape and offset in a returned Fragment refer to the stored gate, so the
    Fragment can be read like any other.

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
