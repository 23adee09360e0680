"""Qwen3-MoE (arXiv 2505.09388). It has the attention of Qwen3, and experts in some or all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.families.family import JSON, Family, bias_section, dense_layers_of, experts_of, top_k_section


class Qwen3MoE(Family):
    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    defaults: ClassVar[JSON] = {
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    }
    sizes: ClassVar[tuple[str, ...]] = ("moe_intermediate_size", "num_experts", "num_experts_per_tok")

    def model_section(self, given: Mapping[str, Any], where: str) -> tuple[ModelConfig, int]:
        """Convert a config.json to a `model:` section. Also return the vocabulary size.

        The number of experts is called num_experts by transformers 4, and num_local_experts by transformers 5.
        """
        number = {"num_experts": given["num_local_experts"]} if "num_local_experts" in given else {}
        return super().model_section({**given, **number}, where)

    def attention(self, raw: JSON) -> JSON:
        return {"qk_norm": "rms_norm", **bias_section(raw)}

    def ffn(self, raw: JSON) -> JSON:
        renormalize = bool(raw.get("norm_topk_prob"))
        return top_k_section(
            raw, hidden_size="moe_intermediate_size", num_experts="num_experts", renormalize=renormalize
        )

    def windows(self, raw: JSON) -> list[int]:
        window = raw["sliding_window"] if raw.get("use_sliding_window") else None
        return [window or 0] * raw["num_hidden_layers"]

    def dense_layers(self, raw: JSON) -> Sequence[int]:
        step, listed = raw.get("decoder_sparse_step") or 1, raw.get("mlp_only_layers") or []
        return [layer for layer in range(raw["num_hidden_layers"]) if layer in listed or (layer + 1) % step]

    def keys(self, model: ModelConfig) -> JSON:
        window = {"use_sliding_window": model.sliding_window > 0, "sliding_window": model.sliding_window or None}
        return sparse_keys(model) | window | {"attention_bias": model.attention_bias == "all"}


def sparse_keys(model: ModelConfig) -> JSON:
    """Return the keys of config.json that describe the experts. Qwen3-MoE and Qwen2-MoE have the same keys."""
    (ffn, router), (dense, width) = experts_of(model), dense_layers_of(model)
    return {
        "intermediate_size": width,
        "moe_intermediate_size": ffn.hidden_size,
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }
