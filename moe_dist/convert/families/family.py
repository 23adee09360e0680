"""Base class of the families of Hugging Face models, with what most decoders have in common.

A family consists of all models with the same model_type in config.json. All of them are pre-norm decoders with rotary
embedding and SwiGLU feed-forward parts. A subclass adds what is special about its family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from moe_dist.config.model_section import DenseFFN, ModelConfig, MoEFFN
from moe_dist.convert.families.rope_keys import rope_json, rope_section
from moe_dist.convert.tensor_maps import (
    ExpertNames,
    TensorMapping,
    attention_mappings,
    dense_mappings,
    expert_mappings,
)
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.model.site import block_name

JSON = dict[str, Any]  # the content of a config.json, or a part of it


class Family:
    """The conversion of a family of Hugging Face models, in both directions."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]  # transformers' class
    defaults: ClassVar[JSON] = {}  # values of keys that config.json may omit
    refused: ClassVar[JSON] = {}  # keys of config.json -> the only value that is supported
    sizes: ClassVar[tuple[str, ...]] = ()  # keys that must be positive integers, besides those of every family
    names: ClassVar[ExpertNames] = ExpertNames()
    has_head_dim: ClassVar[bool] = True  # False: a head's size is always hidden_size / num_attention_heads
    stacks_experts: ClassVar[bool] = True  # transformers 5 has stacked the experts of a layer into two parameters

    def model_section(self, given: Mapping[str, Any], where: str) -> tuple[ModelConfig, int]:
        """Convert a config.json to a `model:` section. Also return the vocabulary size.

        where: the path of the file, for error messages. Raises UserError if a key is invalid or if its value is not
        supported. The message names the key.
        """
        raw = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, **self.defaults, **given}
        refused = {"hidden_act": "silu", "quantization_config": None, "attention_dropout": 0.0, **self.refused}
        for key, value in refused.items():
            if raw.get(key, value) not in (value, None):
                raise UserError(f"{where}: {key}={raw[key]!r} is not supported, only {value!r} is")
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for key in (*sizes, *self.sizes):
            if not isinstance(raw.get(key), int) or raw[key] < 1:
                raise UserError(f"{where}: key '{key}' is missing or is not a positive integer")
        try:
            section = self._section(raw, where)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{where} is not a config.json of a {self.model_type} model: {error}") from None
        return validate(ModelConfig, section, where), raw["vocab_size"]

    def _section(self, raw: JSON, where: str) -> JSON:
        return {
            "hidden_size": raw["hidden_size"],
            "num_layers": raw["num_hidden_layers"],
            "num_heads": raw["num_attention_heads"],
            "num_query_groups": raw.get("num_key_value_heads") or raw["num_attention_heads"],
            "head_size": (self.has_head_dim and raw.get("head_dim"))
            or raw["hidden_size"] // raw["num_attention_heads"],
            "ffn": self.ffn(raw),
            "norm": "pre",
            "norm_epsilon": raw["rms_norm_eps"],
            "qk_norm": "none",
            **rope_section(raw, where),
            "tie_embeddings": raw.get("tie_word_embeddings", False),
            "init_std": raw.get("initializer_range", 0.02),
            **self.attention(raw),
            **_layer_differences(self._differences(raw)),
        }

    def attention(self, raw: JSON) -> JSON:
        """Return the attention settings of the `model:` section that differ from those of Llama."""
        return {}

    def ffn(self, raw: JSON) -> JSON:
        """Convert a config.json to the section `ffn` of a `model:` section."""
        return {"type": "dense", "hidden_size": raw["intermediate_size"]}

    def windows(self, raw: JSON) -> list[int]:
        """Return the size of each layer's sliding window, or 0 for a layer with full attention."""
        return [0] * raw["num_hidden_layers"]

    def dense_layers(self, raw: JSON) -> Sequence[int]:
        """Return the layers without experts, in a model with experts."""
        return ()

    def _differences(self, raw: JSON) -> list[JSON]:
        """Return, for each layer, the settings that differ from the default.

        By default, a layer uses the model's `ffn` section and full attention.
        """
        dense = {"ffn": Family.ffn(self, raw)}
        without = set(self.dense_layers(raw))
        windows = enumerate(self.windows(raw))
        return [
            (dense if layer in without else {}) | ({"sliding_window": window} if window else {})
            for layer, window in windows
        ]

    def config_json(self, model: ModelConfig, vocab_size: int) -> JSON:
        """Return a config.json for a model, in a form that transformers 4 and 5 can read.

        The result describes the model only if model_section gives the same model back (family_registry.py).
        """
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.query_groups,
            **({"head_dim": model.size_per_head} if self.has_head_dim else {}),
            "hidden_act": "silu",
            "initializer_range": model.init_std,
            "rms_norm_eps": model.norm_epsilon,
            **rope_json(model),
            "tie_word_embeddings": model.tie_embeddings,
            "bos_token_id": None,  # the tokenizer has them; if omitted, transformers assumes 1 and 2
            "eos_token_id": None,
            **self.keys(model),
        }

    def keys(self, model: ModelConfig) -> JSON:
        """Return `intermediate_size`, and the keys of config.json that are specific to the family."""
        assert isinstance(model.ffn, DenseFFN)
        return {"intermediate_size": model.ffn.hidden_size}

    def tensor_mappings(self, model: ModelConfig, vocab_size: int) -> Iterator[TensorMapping]:
        """Yield a mapping for every parameter of the model.

        Heads need no reordering: Hugging Face's rotary embedding and ours both pair the first half of a head with the
        second.
        """
        D = model.hidden_size
        matrix, vector = (vocab_size, D), (D,)
        yield TensorMapping("embedding.weight", matrix, {"model.embed_tokens.weight": matrix})
        for layer in range(model.num_layers):
            ours, theirs = block_name(layer), f"model.layers.{layer}"
            yield from attention_mappings(model, f"{ours}.attention.core", f"{theirs}.self_attn")
            yield TensorMapping(f"{ours}.attention_norm.weight", vector, {f"{theirs}.input_layernorm.weight": vector})
            ffn = model.ffn_of(layer)
            if isinstance(ffn, DenseFFN):
                yield from dense_mappings(D, ffn.hidden_size, f"{ours}.ffn", f"{theirs}.mlp", bias=ffn.bias)
            else:
                yield from expert_mappings(D, ffn, f"{ours}.ffn", theirs, self.names)
            norm = f"{theirs}.post_attention_layernorm.weight"
            yield TensorMapping(f"{ours}.ffn_norm.weight", vector, {norm: vector})
        yield TensorMapping("norm.weight", vector, {"model.norm.weight": vector})
        if not model.tie_embeddings:
            yield TensorMapping("output.weight", matrix, {"lm_head.weight": matrix})


def bias_section(raw: JSON) -> JSON:
    """Return the setting `attention_bias` of a family in which the key of the same name covers q, k, v and o."""
    return {"attention_bias": "all"} if raw.get("attention_bias") else {}


def top_k_section(raw: JSON, *, hidden_size: str, num_experts: str, renormalize: bool) -> JSON:
    """Return the `ffn` section of a model with experts.

    raw: a config.json. hidden_size, num_experts: its keys for the width of an expert and for the number of experts.
    renormalize: whether the weights of a token's top-k experts are scaled to sum to 1.
    """
    router = {"type": "top_k", "num_experts": raw[num_experts], "top_k": raw["num_experts_per_tok"]}
    return {"type": "moe", "hidden_size": raw[hidden_size], "router": router | {"renormalize": renormalize}}


def experts_of(model: ModelConfig) -> tuple[MoEFFN, Any]:
    """Return the `ffn` section of a model with experts, and the settings of its router."""
    assert isinstance(model.ffn, MoEFFN)
    return model.ffn, model.ffn.router


def dense_layers_of(model: ModelConfig) -> tuple[list[int], int]:
    """Return the indices of the layers without experts, and the width of their feed-forward parts.

    If every layer has experts, return the width of one expert: config.json requires a width, although it is unused.
    """
    dense = [layer for layer in range(model.num_layers) if layer not in model.expert_layers]
    return dense, model.ffn_of(dense[0] if dense else 0).hidden_size


def _layer_differences(differences: list[JSON]) -> JSON:
    """Return the keys `sliding_window` and `layers` of a `model:` section.

    differences: the result of Family._differences.
    """
    windows = [of_layer.get("sliding_window", 0) for of_layer in differences]
    section: JSON = {}
    if windows[0] and len(set(windows)) == 1:
        section["sliding_window"] = windows[0]
        differences = [{k: v for k, v in of_layer.items() if k != "sliding_window"} for of_layer in differences]
    layers: JSON = {}
    for different in (
        of_layer for n, of_layer in enumerate(differences) if of_layer and of_layer not in differences[:n]
    ):
        layers[_spans([n for n, of_layer in enumerate(differences) if of_layer == different])] = different
    return section | ({"layers": layers} if layers else {})


def _spans(numbers: list[int]) -> str:
    """Write ascending layer numbers as a key of `model.layers`. For example, [0, 4, 5, 6] becomes "0,4-6"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
