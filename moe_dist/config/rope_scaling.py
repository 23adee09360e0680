"""Settings for scaling the rotary embedding, to extend a model to longer texts.

`model.rope_scaling.type` in a recipe selects one of the classes below. Types and settings have the same names as in
Hugging Face's config.json. model/rope.py applies the scaling.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_dist.core.strict import Positive, Strict

Factor = Annotated[float, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0)]


class LinearScaling(Strict):
    """All positions are divided by `factor` (Chen et al., arXiv 2306.15595)."""

    type: Literal["linear"]
    factor: Factor


class Llama3Scaling(Strict):
    """Scaling of Llama 3.1.

    Low frequencies are divided by `factor`, and high frequencies are kept. In between, the scaling changes gradually.
    """

    type: Literal["llama3"]
    factor: Factor
    low_freq_factor: AboveZero
    high_freq_factor: AboveZero
    original_max_position_embeddings: Positive

    @model_validator(mode="after")
    def _ordered(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor={self.high_freq_factor} must exceed low_freq_factor")
        return self


class YarnScaling(Strict):
    """YaRN scaling (Peng et al., arXiv 2309.00071).

    Low frequencies are divided by `factor`, and high frequencies are kept. In between, the scaling changes gradually.
    Queries and keys are also multiplied by `attention_factor`.
    """

    type: Literal["yarn"]
    factor: Factor
    original_max_position_embeddings: Positive
    beta_fast: AboveZero = 32.0
    beta_slow: AboveZero = 1.0
    attention_factor: AboveZero | None = None  # default: 0.1 ln(factor) + 1
    truncate: bool = True  # round the limits of the interpolated range to whole dimensions


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="type")]
