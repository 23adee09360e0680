"""The place of a module in the model, from which parameter names and the standard deviations of initial values are
derived.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from moe_dist.config.model_section import ModelConfig
from moe_dist.core.seeding import fold_key, seeded_normal_


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The place of a module in the model. The module's constructor gets it in addition to the module's settings.

    A module gives each of its parts the site `child(ATTRIBUTE)`, where ATTRIBUTE is the attribute that holds the part.
    The `name` of this site is then the part's name in the module tree.
    """

    hidden_size: int
    layer: int
    seed: int
    init_std: float
    output_std: float | None = None  # for projections onto the residual stream; None: init_std
    name: str  # prefix of the parameter names; it also seeds the random numbers

    def child(self, name: str) -> Site:
        return replace(self, name=f"{self.name}.{name}")

    def key(self, purpose: str) -> int:
        """Return the key that seeds the module's random numbers for one purpose."""
        return fold_key(self.seed, self.name, purpose)

    def draw(self, parameter: Tensor, name: str, *, std: float | None = None, onto_residual: bool = False) -> None:
        """Draw the initial values of the module's parameter `name`.

        onto_residual: true for a projection onto the residual stream. std: the standard deviation. If it is None,
        `output_std` is used for projections onto the residual stream (if it is set), otherwise `init_std`.
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
    )


def depth_site(model: ModelConfig, layer: int, seed: int) -> Site:
    """Return the site of the mixture-of-depths around block number `layer`."""
    return replace(block_site(model, layer, seed), name=f"depth.{layer}")
