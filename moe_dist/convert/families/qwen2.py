"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on q, k and v, and a sliding window in the upper layers."""

from __future__ import annotations

from typing import ClassVar

from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.families.family import JSON, Family

WINDOW_KINDS = {"full_attention", "sliding_attention"}


class Qwen2(Family):
    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults: ClassVar[JSON] = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

    def attention(self, raw: JSON) -> JSON:
        return {"attention_bias": "qkv"}

    def windows(self, raw: JSON) -> list[int]:
        upper = range(raw["max_window_layers"], raw["num_hidden_layers"])
        return typed_windows(raw, upper)

    def keys(self, model: ModelConfig) -> JSON:
        return super().keys(model) | window_keys(model)


def typed_windows(raw: JSON, by_default: range) -> list[int]:
    """Return the sliding window of each layer of a Qwen model. A layer without a window gets 0.

    raw: the content of config.json. by_default: the layers with a window if config.json has no `layer_types`. Raises
    ValueError if `layer_types` does not name full_attention or sliding_attention for every layer.
    """
    window = raw["sliding_window"] if raw.get("use_sliding_window") else None
    kinds = raw.get("layer_types")
    if kinds is not None and ({*kinds} - WINDOW_KINDS or len(kinds) != raw["num_hidden_layers"]):
        raise ValueError(f"layer_types must be {' or '.join(sorted(WINDOW_KINDS))} for each of its layers")
    chosen = by_default if kinds is None else [n for n, kind in enumerate(kinds) if kind == "sliding_attention"]
    return [window if window and layer in chosen else 0 for layer in range(raw["num_hidden_layers"])]


def window_keys(model: ModelConfig) -> JSON:
    """Return the keys of config.json for a model's sliding windows. All windows must have the same size."""
    windows = [model.window_of(layer) for layer in range(model.num_layers)]
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    first = next((layer for layer, window in enumerate(windows) if window), model.num_layers)
    return {
        "use_sliding_window": any(windows),
        "sliding_window": max(windows) or None,
        "max_window_layers": first,
        "layer_types": kinds,
    }
