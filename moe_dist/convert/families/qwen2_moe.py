"""Qwen2-MoE and Qwen1.5-MoE (arXiv 2407.10671): Qwen2's attention, and MoE layers with a gated shared expert."""

from __future__ import annotations

from typing import ClassVar

from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.families.family import JSON, experts_of
from moe_dist.convert.families.qwen2 import typed_windows, window_keys
from moe_dist.convert.families.qwen3_moe import Qwen3MoE, sparse_keys


class Qwen2MoE(Qwen3MoE):
    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    defaults: ClassVar[JSON] = {
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "qkv_bias": True,
    }
    sizes: ClassVar[tuple[str, ...]] = (*Qwen3MoE.sizes, "shared_expert_intermediate_size")

    def attention(self, raw: JSON) -> JSON:
        return {"attention_bias": "qkv"} if raw["qkv_bias"] else {}

    def ffn(self, raw: JSON) -> JSON:
        shared = {"hidden_size": raw["shared_expert_intermediate_size"], "gate": True}
        return super().ffn(raw) | {"shared_expert": shared}

    def windows(self, raw: JSON) -> list[int]:
        return typed_windows(raw, range(0, min(raw["max_window_layers"], raw["num_hidden_layers"]), 2))

    def keys(self, model: ModelConfig) -> JSON:
        ffn, _ = experts_of(model)
        shared = ffn.shared_expert
        return (
            sparse_keys(model)
            | window_keys(model)
            | {
                "shared_expert_intermediate_size": shared.hidden_size if shared else ffn.hidden_size,
                "qkv_bias": model.attention_bias == "qkv",
            }
        )
