"""OLMoE (arXiv 2409.02060).

One RMSNorm covers all query heads, and another covers all key heads. Queries, keys and values may be clipped.
"""

from __future__ import annotations

from typing import ClassVar

from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.families.family import JSON, Family, bias_section, experts_of, top_k_section


class OLMoE(Family):
    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    has_head_dim = False
    defaults: ClassVar[JSON] = {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8}
    refused: ClassVar[JSON] = {"sliding_window": None}
    sizes: ClassVar[tuple[str, ...]] = ("num_experts", "num_experts_per_tok")

    def attention(self, raw: JSON) -> JSON:
        section: JSON = {"qk_norm": "rms_norm_full", **bias_section(raw)}
        return section | ({"clip_qkv": raw["clip_qkv"]} if raw.get("clip_qkv") else {})

    def ffn(self, raw: JSON) -> JSON:
        renormalize = bool(raw.get("norm_topk_prob"))
        return top_k_section(raw, hidden_size="intermediate_size", num_experts="num_experts", renormalize=renormalize)

    def keys(self, model: ModelConfig) -> JSON:
        ffn, router = experts_of(model)
        return {
            "intermediate_size": ffn.hidden_size,
            "num_experts": router.num_experts,
            "num_experts_per_tok": router.top_k,
            "norm_topk_prob": router.renormalize,
            "attention_bias": model.attention_bias == "all",
            "clip_qkv": model.clip_qkv,
        }
