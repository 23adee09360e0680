"""Mistral (arXiv 2310.06825): Llama with a sliding window in every layer."""

from __future__ import annotations

from typing import ClassVar

from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.families.family import JSON, Family


class Mistral(Family):
    model_type = "mistral"
    architecture = "MistralForCausalLM"
    defaults: ClassVar[JSON] = {"num_key_value_heads": 8, "sliding_window": 4096}

    def windows(self, raw: JSON) -> list[int]:
        return [raw["sliding_window"] or 0] * raw["num_hidden_layers"]

    def keys(self, model: ModelConfig) -> JSON:
        return super().keys(model) | {"sliding_window": model.sliding_window or None}
