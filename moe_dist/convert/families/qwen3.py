"""Qwen3 (arXiv 2505.09388): an RMSNorm of each query and key head, and no biases by default."""

from __future__ import annotations

from typing import ClassVar

from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.families.family import JSON, bias_section
from moe_dist.convert.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults: ClassVar[JSON] = {"head_dim": 128, **Qwen2.defaults}

    def attention(self, raw: JSON) -> JSON:
        return {"qk_norm": "rms_norm", **bias_section(raw)}

    def keys(self, model: ModelConfig) -> JSON:
        return super().keys(model) | {"attention_bias": model.attention_bias == "all"}
