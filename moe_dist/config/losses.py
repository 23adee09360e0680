"""Settings of the auxiliary loss terms. The section `losses` of a recipe maps the name of a term to its settings.

A settings class registers itself when it is defined. losses/loss_registry.py maps each settings class to the term's
class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, model_serializer, model_validator

from moe_dist.core.strict import Count, Fault, Faults, Positive, Strict, nested, nested_items, pick, within


def _in_order(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    firsts = [first for first, _ in points]
    if any(a >= b for a, b in pairwise(firsts)):
        raise ValueError(f"the first steps {firsts} do not ascend")
    return points


Weight = Annotated[float, Field(ge=0)]
Points = Annotated[tuple[tuple[Count, Weight], ...], Field(min_length=1), AfterValidator(_in_order)]


class WeightSchedule(Strict):
    """The weight of a loss term as a function of the step, given by points (step, weight) with ascending steps.

    The weight is 0 before the first point and constant after the last point. Between two points, it depends on `type`:
    - `step` keeps the weight of the earlier point.
    - `linear` interpolates linearly.
    - `cosine` interpolates along half a cosine wave, so the weight has slope 0 at both points.

    In a recipe, a plain number is a constant weight, and a plain list of points is a schedule of the type `step`.
    """

    type: Literal["step", "linear", "cosine"] = "step"
    points: Points

    @model_serializer(mode="plain")
    def _shortest_form(self) -> Any:
        """Return the serialized form of the schedule.

        A schedule of the type `step` is serialized as a plain list of points, as in checkpoints of earlier versions.
        """
        points = [list(point) for point in self.points]
        return points if self.type == "step" else {"type": self.type, "points": points}

    def at(self, step: int) -> float:
        earlier = [point for point in self.points if point[0] <= step]
        if not earlier:
            return 0.0
        first, weight = earlier[-1]
        if self.type == "step" or len(earlier) == len(self.points):
            return weight
        next_first, next_weight = self.points[len(earlier)]
        share = (step - first) / (next_first - first)
        if self.type == "cosine":
            share = 0.5 * (1.0 - math.cos(math.pi * share))
        return weight + (next_weight - weight) * share


def _parse_weight(raw: Any) -> WeightSchedule:
    """Convert a weight in any of its forms to a WeightSchedule.

    Raises Faults if the weight is invalid. The keys of the faults refer to the given form of the weight.
    """
    if isinstance(raw, WeightSchedule):
        return raw
    if isinstance(raw, Mapping):
        return nested(WeightSchedule, raw)
    is_list = isinstance(raw, list | tuple)
    try:
        return nested(WeightSchedule, {"points": raw if is_list else [[0, raw]]})
    except Faults as faults:
        if is_list:
            raise Faults(Fault(fault.keys[1:], fault.text) for fault in faults.faults) from None
        raise Faults([Fault((), faults.faults[0].text)]) from None


class TermSettings(Strict):
    """Base class of the settings of a loss term.

    A subclass gives the term's name in recipes as a class argument: `class X(TermSettings, name="x")`.
    weight: a number, a list of [first step, weight], or {type: linear, points: [[step, weight], ...]}.
    """

    kinds: ClassVar[dict[str, type[TermSettings]]] = {}
    weight: Annotated[WeightSchedule, BeforeValidator(_parse_weight)]

    def __init_subclass__(cls, *, name: str) -> None:
        TermSettings.kinds[name] = cls

    def weight_at(self, step: int) -> float:
        return self.weight.at(step)


def _parse_term(name: str, section: Any) -> TermSettings:
    kind = pick(TermSettings.kinds, name, "", "there is no such loss")
    return section if isinstance(section, TermSettings) else nested(kind, section)


def _parse(raw: Any) -> Any:
    return nested_items(raw, _parse_term) if isinstance(raw, Mapping) else raw


LossesSection = Annotated[dict[str, SerializeAsAny[TermSettings]], BeforeValidator(_parse)]


def loss_settings(raw: Mapping[str, Any]) -> dict[str, TermSettings]:
    """Validate loss settings that do not come from a recipe, and return them keyed by the name of the loss term.

    Raises UserError naming the invalid key.
    """
    return within("recipe", lambda: _parse(raw), "losses")


class CausalRoutersSettings(TermSettings, name="causal_routers"):
    pass


class LoadBalanceSettings(TermSettings, name="load_balance"):
    scope: Literal["group", "sequence", "global"] = "group"


class NeighbourSettings(Strict):
    """Settings for finding and weighting each sample's neighbours in RoMA (alignment/nearest_neighbours.py).

    kind: which samples of the pool become neighbours. `nearest` selects the k nearest samples, and `ball` selects all
    samples with a similarity of at least epsilon. `random` selects k random samples, and `all` selects the whole pool.
    These two are controls.
    pool: `successful` has the samples that the model answers correctly. `all` has all samples (a control).
    distance: `euclidean` is the distance of the normalised embeddings. `cosine` is 1 minus their cosine.
    sigma: the width of the similarity. If it is None, it is the median distance to the k nearest samples.
    seed: the seed of random neighbours.
    """

    kind: Literal["nearest", "ball", "random", "all"] = "nearest"
    k: Positive = 3
    epsilon: Annotated[float, Field(gt=0, le=1)] | None = None
    pool: Literal["successful", "all"] = "successful"
    distance: Literal["euclidean", "cosine"] = "euclidean"
    sigma: Annotated[float, Field(gt=0)] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _ball_has_a_radius(self):
        if (self.epsilon is None) == (self.kind == "ball"):
            raise ValueError(
                f"kind={self.kind} and epsilon={self.epsilon}: kind ball needs epsilon, no other kind has it"
            )
        return self


class ManifoldSettings(TermSettings, name="manifold"):
    last_layers: Positive = 5  # the paper's best: five layers 76.2, all sixteen 75.1 (OLMoE, mean accuracy)
    neighbours: NeighbourSettings = NeighbourSettings()


class PooledBalanceSettings(TermSettings, name="pooled_balance"):
    pass


class RouterZSettings(TermSettings, name="router_z"):
    pass
