"""Selection of the parameters to train, according to the recipe's `trainable`. Other parameters are frozen: they have
no gradient and no optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from moe_dist.core.name_patterns import matching


def freeze_others(model: nn.Module, patterns: Iterable[str]) -> None:
    """Freeze every parameter whose name matches none of the patterns.

    Parameters already frozen by their own modules stay frozen. If a pattern matches no parameter, or only parameters
    that their modules have frozen, raises UserError naming the pattern.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = matching(patterns, parameters, key="trainable", what="parameter that the model can train")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
