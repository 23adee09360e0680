"""The place of a module in the model. It determines the names and the initial values of the module's parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from moe_dist.config.model_section import LoRASection, ModelConfig
from moe_dist.core.seeding import fold_key, seeded_normal_


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The place of a module in the model. A module's constructor gets it in addition to the module's settings.

    If a module stores a part in the attribute ATTRIBUTE, it gives the part the site `child(ATTRIBUTE)`. The site's
    `name` is then the part's name in the module tree.
    """

    hidden_size: int
    layer: int
    seed: int
    init_std: float
    output_std: float | None = None  # for projections onto the residual stream; None: init_std
    name: str  # prefix of the parameter names; it also seeds the random numbers
    lora: LoRASection | None = None  # of the model; None: no weight of the module gets LoRA deltas

    def child(self, name: str) -> Site:
        return replace(self, name=f"{self.name}.{name}")

    def adapted(self, target: str, parts: Iterable[str]) -> tuple[str, ...]:
        """Return the parts of a target that get LoRA deltas, such as ("q", "v") of "attention"."""
        lora = self.lora
        return () if lora is None else tuple(part for part in parts if lora.has(f"{target}.{part}"))

    def key(self, purpose: str) -> int:
        """Return the key that seeds the module's random numbers for one purpose."""
        return fold_key(self.seed, self.name, purpose)

    def draw(self, parameter: Tensor, name: str, *, std: float | None = None, onto_residual: bool = False) -> None:
        """Draw the initial values of the module's parameter `name` from a normal distribution.

        std: the standard deviation. If it is None, `init_std` is used.
        onto_residual: true for a projection onto the residual stream. If `std` is None and `output_std` is set,
        `output_std` is used for such a projection.
        """
        if std is None:
            std = self.output_std if onto_residual and self.output_std is not None else self.init_std
        seeded_normal_(parameter, seed=self.seed, name=f"{self.name}.{name}", std=std)


def block_name(layer: int) -> str:
    """Return the prefix of all parameter names of block number `layer`."""
    return f"layers.{layer}"


def block_site(model: ModelConfig, layer: int, seed: int) -> Site:
    """Return the site of block number `layer`."""
    return Site(
        hidden_size=model.hidden_size,
        layer=layer,
        seed=seed,
        init_std=model.init_std,
        output_std=model.init_std / math.sqrt(2 * model.num_layers),  # for 2 * num_layers projections (GPT-2)
        name=block_name(layer),
        lora=model.lora,
    )


def depth_site(model: ModelConfig, layer: int, seed: int) -> Site:
    """Return the site of the mixture-of-depths module around block number `layer`."""
    return replace(block_site(model, layer, seed), name=f"depth.{layer}", lora=None)
