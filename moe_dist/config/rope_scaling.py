"""Settings of the scaling of the rotary embedding, with which a pretrained model was extended to longer texts.

`model.rope_scaling.type` in a recipe selects one of the classes below, under the names of Hugging Face's config.json.
model/rope.py applies them.
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
    """Long wavelengths are multiplied by `factor`, short ones are kept, those between are interpolated (Llama 3.1)."""

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
    """YaRN (Peng et al., arXiv 2309.00071): an interpolation by frequency, and a factor on the queries and keys."""

    type: Literal["yarn"]
    factor: Factor
    original_max_position_embeddings: Positive
    beta_fast: AboveZero = 32.0
    beta_slow: AboveZero = 1.0
    attention_factor: AboveZero | None = None  # default: 0.1 ln(factor) + 1
    truncate: bool = True  # round the limits of the interpolated range to whole dimensions


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="type")]
