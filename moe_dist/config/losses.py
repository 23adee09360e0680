"""Settings of the auxiliary loss terms. The section `losses` of a recipe maps the name of a term to its settings.

A settings class registers itself when it is defined. losses/loss_registry.py maps each settings class to the term's
class.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny

from moe_dist.core.strict import Count, Positive, Strict, nested, nested_items, pick, within


def _as_steps(weight: Any) -> Any:
    if isinstance(weight, list):
        return tuple(tuple(item) if isinstance(item, list) else item for item in weight)
    return ((0, weight),)


def _in_order(steps: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    firsts = [first for first, _ in steps]
    if any(a >= b for a, b in pairwise(firsts)):
        raise ValueError(f"the first steps {firsts} do not ascend")
    return steps


Weight = Annotated[float, Field(ge=0)]
Steps = Annotated[
    tuple[tuple[Count, Weight], ...], Field(min_length=1), BeforeValidator(_as_steps), AfterValidator(_in_order)
]


class TermSettings(Strict):
    """Base class of the settings of a loss term.

    A subclass gives the term's name in recipes as a class argument: `class X(TermSettings, name="x")`.
    weight: a number, or a list of [first step, weight] with ascending first steps. Before the earliest of these steps,
    the weight is 0.
    """

    kinds: ClassVar[dict[str, type[TermSettings]]] = {}
    weight: Steps

    def __init_subclass__(cls, *, name: str) -> None:
        TermSettings.kinds[name] = cls

    def weight_at(self, step: int) -> float:
        return next((weight for first, weight in reversed(self.weight) if step >= first), 0.0)


def _parse_term(name: str, section: Any) -> TermSettings:
    kind = pick(TermSettings.kinds, name, "", "there is no such loss")
    return section if isinstance(section, TermSettings) else nested(kind, section)


def _parse(raw: Any) -> Any:
    return nested_items(raw, _parse_term) if isinstance(raw, Mapping) else raw


LossesSection = Annotated[dict[str, SerializeAsAny[TermSettings]], BeforeValidator(_parse)]


def loss_settings(raw: Mapping[str, Any]) -> dict[str, TermSettings]:
    """Validate loss settings that do not come from a recipe. Raises UserError naming the invalid key."""
    return within("recipe", lambda: _parse(raw), "losses")


class CausalRoutersSettings(TermSettings, name="causal_routers"):
    pass


class LoadBalanceSettings(TermSettings, name="load_balance"):
    scope: Literal["group", "sequence", "global"] = "group"


class ManifoldSettings(TermSettings, name="manifold"):
    last_layers: Positive = 5  # the paper's best: five layers 76.2, all sixteen 75.1 (OLMoE, mean accuracy)


class PooledBalanceSettings(TermSettings, name="pooled_balance"):
    pass


class RouterZSettings(TermSettings, name="router_z"):
    pass
