"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783), and other models with model_type llama, such as SmolLM2 and Vicuna."""

from __future__ import annotations

from moe_dist.config.model_section import DenseFFN, ModelConfig
from moe_dist.convert.families.family import JSON, Family, bias_section


class Llama(Family):
    """Dense models with optional biases: attention_bias for q, k, v and o, mlp_bias for the feed-forward part."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def attention(self, raw: JSON) -> JSON:
        return bias_section(raw)

    def ffn(self, raw: JSON) -> JSON:
        return super().ffn(raw) | ({"bias": True} if raw.get("mlp_bias") else {})

    def keys(self, model: ModelConfig) -> JSON:
        assert isinstance(model.ffn, DenseFFN)
        biases = {"attention_bias": model.attention_bias == "all", "mlp_bias": model.ffn.bias}
        return super().keys(model) | biases
