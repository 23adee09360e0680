"""Mixtral (arXiv 2401.04088): top-k experts with renormalised gate values. No tokens are dropped."""

from __future__ import annotations

from typing import ClassVar

from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.families.family import JSON, Family, experts_of, top_k_section
from moe_dist.convert.tensor_maps import ExpertNames


class Mixtral(Family):
    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    defaults: ClassVar[JSON] = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    sizes: ClassVar[tuple[str, ...]] = ("num_local_experts", "num_experts_per_tok")
    names = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")

    def ffn(self, raw: JSON) -> JSON:
        return top_k_section(raw, hidden_size="intermediate_size", num_experts="num_local_experts", renormalize=True)

    def windows(self, raw: JSON) -> list[int]:
        return [raw.get("sliding_window") or 0] * raw["num_hidden_layers"]

    def keys(self, model: ModelConfig) -> JSON:
        ffn, router = experts_of(model)
        return {
            "intermediate_size": ffn.hidden_size,
            "num_local_experts": router.num_experts,
            "num_experts_per_tok": router.top_k,
            "sliding_window": model.sliding_window or None,
        }
