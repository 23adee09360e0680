"""DeepSeekMoE (arXiv 2401.06066): narrow experts beside shared ones, after one or more dense layers.

transformers has no model for this family: DeepSeek's folders bring their own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.families.family import JSON, Family, bias_section, dense_layers_of, experts_of, top_k_section
from moe_dist.convert.tensor_maps import ExpertNames


class DeepSeekMoE(Family):
    """The DeepSeekMoE family.

    The shared experts of a layer are one SwiGLU that is n_shared_experts times as wide as an expert.
    """

    model_type = "deepseek"
    architecture = "DeepseekForCausalLM"
    has_head_dim = False
    defaults: ClassVar[JSON] = {"first_k_dense_replace": 0, "moe_layer_freq": 1}
    refused: ClassVar[JSON] = {"scoring_func": "softmax", "routed_scaling_factor": 1.0, "mlp_bias": False}
    sizes: ClassVar[tuple[str, ...]] = ("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
    names = ExpertNames(shared="shared_experts")
    stacks_experts = False

    def attention(self, raw: JSON) -> JSON:
        return bias_section(raw)

    def ffn(self, raw: JSON) -> JSON:
        renormalize = bool(raw.get("norm_topk_prob")) and raw["num_experts_per_tok"] > 1  # as in DeepSeek's own code
        section = top_k_section(
            raw, hidden_size="moe_intermediate_size", num_experts="n_routed_experts", renormalize=renormalize
        )
        shared = {"hidden_size": (raw.get("n_shared_experts") or 0) * raw["moe_intermediate_size"]}
        return section | ({"shared_expert": shared} if shared["hidden_size"] else {})

    def dense_layers(self, raw: JSON) -> Sequence[int]:
        first, every = raw["first_k_dense_replace"], raw["moe_layer_freq"]
        return [layer for layer in range(raw["num_hidden_layers"]) if layer < first or layer % every]

    def keys(self, model: ModelConfig) -> JSON:
        (ffn, router), (dense, width) = experts_of(model), dense_layers_of(model)
        shared = ffn.shared_expert
        return {
            "intermediate_size": width,
            "moe_intermediate_size": ffn.hidden_size,
            "n_routed_experts": router.num_experts,
            "num_experts_per_tok": router.top_k,
            "norm_topk_prob": router.renormalize,
            "n_shared_experts": shared.hidden_size // ffn.hidden_size if shared else None,
            "first_k_dense_replace": len(dense),
            "moe_layer_freq": 1,
            "attention_bias": model.attention_bias == "all",
        }
