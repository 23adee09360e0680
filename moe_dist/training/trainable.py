"""Selection of the parameters to train, according to the recipe's `trainable`. Other parameters are frozen: they have
no gradient and no optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from moe_dist.core.expert_rows import is_stacked
from moe_dist.core.name_patterns import matching


def num_trained(model: nn.Module, expert: int) -> int:
    """Return the number of trained elements over all ranks. expert: the number of ranks with different experts."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    # A parameter that ZeRO-3 has partitioned keeps its own size in the attribute `ds_numel`.
    return sum(getattr(p, "ds_numel", p.numel()) * (expert if is_stacked(p) else 1) for p in trained)


def trained_share(model: nn.Module, total: float, expert: int) -> str:
    """Return a sentence that says how many of the `total` parameters a run trains. expert: see num_trained."""
    trained = num_trained(model, expert)
    return f"trains {trained:,} of {int(total):,} parameters ({trained / total:.2%})"


def freeze_others(model: nn.Module, patterns: Iterable[str]) -> None:
    """Freeze every parameter whose name matches none of the patterns.

    Parameters that their own modules have frozen stay frozen. Raises UserError if a pattern matches no parameter, or
    only parameters that are already frozen. The message names the pattern.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = matching(patterns, parameters, key="trainable", what="parameter that the model can train")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
