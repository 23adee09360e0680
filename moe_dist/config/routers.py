"""Settings of routers. In the section `model.ffn.router` of a recipe, `type` selects one of the classes below.

A settings class registers itself when it is defined. model/moe/router_registry.py maps each settings class to the
router's class. This file does not import torch, so a recipe can be checked in milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from moe_dist.core.errors import cut
from moe_dist.core.strict import Count, Positive, Strict, Width, nested, pick, within


class RouterSettings(Strict):
    """Base class of the settings of a router. A subclass registers itself under each name in its Literal `type`."""

    kinds: ClassVar[dict[str, type[RouterSettings]]] = {}
    type: str

    @classmethod
    def __pydantic_init_subclass__(cls, **arguments: Any) -> None:
        for name in get_args(cls.model_fields["type"].annotation):
            RouterSettings.kinds[name] = cls

    def children(self) -> dict[str, RouterSettings]:
        """Return the settings of the router's child routers, keyed by name. The dict is empty if there are none."""
        return {}


def _parse(raw: Any) -> Any:
    if not isinstance(raw, dict):
        return raw
    name = raw.get("type")
    return nested(pick(RouterSettings.kinds, name, "type", f"there is no router '{cut(str(name))}'"), raw)


RouterSection = Annotated[SerializeAsAny[RouterSettings], BeforeValidator(_parse)]


def router_settings(raw: dict[str, Any]) -> RouterSettings:
    """Validate router settings that do not come from a recipe, and return an instance of their settings class.

    Raises UserError if a key is invalid. The message names the key.
    """
    return within("recipe", lambda: _parse(raw), "model.ffn.router")


class TokenChoiceSettings(RouterSettings):
    """Settings that all token-choice routers have.

    capacity_factor: limits an expert to ceil(capacity_factor * tokens * top_k / columns) tokens of a selection group.
    Here, `tokens` is the number of valid tokens in the group, and `columns` is the number of the router's outputs. If
    capacity_factor is null, there is no limit (dropless).
    """

    num_experts: Width
    top_k: Width
    bias: bool = False  # whether the gate has a bias
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    drop_policy: Literal["position", "probability"] = "position"  # kept: the earliest tokens, or the highest gates
    pad_to_capacity: bool = False  # static shapes: every expert gets its capacity in rows; empty rows have weight 0

    @property
    def columns(self) -> int:
        return self.num_experts

    @model_validator(mode="after")
    def _consistent(self):
        if self.top_k > self.columns:
            raise ValueError(f"top_k={self.top_k} is more than the router's {self.columns} columns")
        if self.pad_to_capacity and self.capacity_factor is None:
            raise ValueError("pad_to_capacity needs a capacity_factor")
        return self


class TopKSettings(TokenChoiceSettings):
    type: Literal["top_k"]
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    weighting: Literal["score", "straight_through"] = "score"

    @model_validator(mode="after")
    def _one_weighting(self):
        if self.renormalize and self.weighting == "straight_through":
            raise ValueError("weighting=straight_through leaves nothing to renormalize")
        return self


class NullExpertSettings(TokenChoiceSettings):
    type: Literal["null_experts"]
    num_null_experts: Annotated[Count, Field(le=1 << 17)]
    # The columns whose softmax gives the combine weights: the chosen true experts (eq. 1); all true experts, as in a
    # pretrained model that does not renormalise; or all chosen columns, null experts included (the paper's ablation).
    normalize_over: Literal["chosen_true", "all_true", "chosen"] = "chosen_true"
    reference_top_k: Positive | None = None  # k of the vanilla model, with which telemetry compares FLOPs

    @property
    def columns(self) -> int:
        return self.num_experts + self.num_null_experts


class ExpertChoiceSettings(RouterSettings):
    type: Literal["expert_choice"]
    num_experts: Width
    capacity_factor: Annotated[float, Field(gt=0)] = 1.0
    auxiliary: bool = False  # add an auxiliary router, for causal inference
    gumbel_noise: bool = False  # in training, the gate is sigmoid(x W + G' - G''); for upcycled experts


class ModalitySettings(RouterSettings):
    type: Literal["modality"]
    text: RouterSection
    image: RouterSection

    def children(self) -> dict[str, RouterSettings]:
        return {"text": self.text, "image": self.image}


class DeepSeekV3Settings(TokenChoiceSettings):
    type: Literal["deepseek_v3"]
    groups: Positive = 1
    top_groups: Positive = 1
    scale: Annotated[float, Field(gt=0)] = 1.0  # routed_scaling_factor; 2.5 in DeepSeek-V3
    bias_rate: Annotated[float, Field(ge=0)] = 1e-3  # gamma; DeepSeek-V3 sets it to 0 at the end of pre-training

    @model_validator(mode="after")
    def _equal_groups(self) -> DeepSeekV3Settings:
        size, rest = divmod(self.num_experts, self.groups)
        if rest or (self.groups > 1 and size < 2):
            raise ValueError(f"{self.num_experts} experts do not form {self.groups} equal groups of two or more")
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups={self.top_groups} is more than groups={self.groups}")
        if self.top_k > self.top_groups * size:
            raise ValueError(f"top_k={self.top_k} is more than the {self.top_groups * size} experts of top_groups")
        return self
