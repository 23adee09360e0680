"""The section `model` of a recipe: the architecture, with every key's default."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from moe_dist.config.rope_scaling import RopeScaling
from moe_dist.config.routers import RouterSection
from moe_dist.core.errors import did_you_mean
from moe_dist.core.name_patterns import compiled
from moe_dist.core.strict import Count, Positive, Strict, Width


class DenseFFN(Strict):
    type: Literal["dense"]
    hidden_size: Width
    bias: bool = False  # whether the three projections have biases


class LoRAConfig(Strict):
    """Settings of LoRA (Hu et al., arXiv 2106.09685).

    LoRA adds (alpha / rank) B A dropout(x) to the output of a linear layer whose weight is frozen. A and B are trained.
    """

    rank: Width
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


LORA_TARGETS = (  # the weights that LoRA can be added to
    *(f"attention.{part}" for part in ("q", "k", "v", "o")),
    *(f"{ffn}.{part}" for ffn in ("ffn", "experts", "shared_expert") for part in ("gate", "up", "down")),
    "router",
)


class LoRASection(LoRAConfig):
    """Settings of LoRA on the weights of the model. The weights that get a LoRA delta are frozen.

    targets: names of LORA_TARGETS, or patterns such as attention.* or *.down. In these names, `ffn` means the
    feed-forward part of the layers without experts, and `experts` means every expert. `router` means the gates of the
    routers that choose the experts.
    """

    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("attention.*",)

    @field_validator("targets")
    @classmethod
    def _known(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in targets:
            if not _named(pattern):
                raise ValueError(f"there is no '{pattern}'{did_you_mean(pattern, LORA_TARGETS) or _LISTED}")
        return targets

    def has(self, target: str) -> bool:
        """Return True if `target`, a name of LORA_TARGETS, gets LoRA deltas."""
        return any(target in _named(pattern) for pattern in self.targets)


def _named(pattern: str) -> list[str]:
    """Return the names of LORA_TARGETS that a pattern matches."""
    return [target for target in LORA_TARGETS if compiled(pattern).fullmatch(target)]


_LISTED = f": the names are {', '.join(LORA_TARGETS)}; * matches any text"


class SwiGLUExpertsConfig(Strict):
    type: Literal["swiglu"] = "swiglu"


class LoRAExpertsConfig(LoRAConfig):
    type: Literal["lora"]


class SharedExpertConfig(Strict):
    """Settings of an expert that processes every token, in addition to the experts that the router chooses.

    Source: DeepSeekMoE (arXiv 2401.06066).
    """

    hidden_size: Width
    gate: bool = False  # whether a learned gate in (0, 1) scales the expert's output for each token (Qwen2-MoE)


class MoEFFN(Strict):
    type: Literal["moe"]
    hidden_size: Width  # of one expert; with LoRA experts, of the dense FFN that they share
    experts: Annotated[SwiGLUExpertsConfig | LoRAExpertsConfig, Field(discriminator="type")] = SwiGLUExpertsConfig()
    slices: Width = 1  # number of slices of each expert's hidden size. Slices are placed like experts, so that
    # ranks can share one expert (docs/moma.md, "Balance over ranks")
    shared_expert: SharedExpertConfig | None = None
    router: RouterSection

    @model_validator(mode="after")
    def _sliced(self):
        if self.slices > 1 and isinstance(self.experts, LoRAExpertsConfig):
            raise ValueError(f"slices={self.slices}: LoRA experts share one dense FFN and cannot be sliced")
        if self.slices > 1 and self.hidden_size % (8 * self.slices):
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of 8 times slices={self.slices}, which grouped "
                "matrix products need"
            )
        return self


class DepthConfig(Strict):
    """Settings of mixture-of-depths (MoMa, arXiv 2407.21770): some blocks process only a fraction of the tokens.

    The other tokens skip these blocks.
    """

    capacity: Annotated[float, Field(gt=0, le=1)] = 0.25  # fraction of the competing tokens that a block admits
    every: Positive = 2  # every N-th block uses mixture-of-depths, starting with block 0
    scope: Literal["group", "modality", "sequence"] = "group"  # which tokens compete: a selection group (the
    # paper's batch), each modality in it (so that both have the same admitted fraction), or a packed sequence
    auxiliary: bool = False  # add an auxiliary router to each gate, for causal inference


class LayerConfig(Strict):
    """Settings of layers that differ from the rest of the model. If a key is null, the model's value is used."""

    ffn: DenseFFN | None = None
    sliding_window: Count | None = None


def layer_numbers(key: str) -> list[int]:
    """Return the layers that a key of `model.layers` names, such as [0, 4, 5, 6] for "0,4-6".

    Raises ValueError if the key has another form.
    """
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", key):
        raise ValueError(f"layers: '{key}' is not a list of layer numbers such as 0,4-7")
    spans = [part.split("-") for part in key.split(",")]
    return [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]


QKNorm = Annotated[
    Literal["none", "layer_norm", "rms_norm", "rms_norm_full"],
    BeforeValidator(lambda value: {True: "layer_norm", False: "none"}[value] if isinstance(value, bool) else value),
]


class ModelConfig(Strict):
    hidden_size: Width
    num_layers: Annotated[Width, Field(le=2048)]
    num_heads: Width
    num_query_groups: Width | None = None  # key-value heads, each shared by equally many heads; default: num_heads
    head_size: Width | None = None  # default: hidden_size / num_heads
    ffn: Annotated[DenseFFN | MoEFFN, Field(discriminator="type")]
    depth: DepthConfig | None = None  # mixture-of-depths; None: every block processes all tokens
    norm: Literal["swin", "pre"] = "swin"  # swin: x + norm(f(x)), Chameleon; pre: x + f(norm(x))
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    qk_norm: QKNorm = "layer_norm"  # norm of queries and keys: a LayerNorm (Chameleon) or RMSNorm (Qwen3) of each
    # head, or an RMSNorm of all heads together (OLMoE); true is short for layer_norm, and false for none
    clip_qkv: Annotated[float, Field(gt=0)] | None = None  # limit queries, keys and values to +- this value (OLMoE)
    attention_bias: Literal["none", "qkv", "all"] = "none"  # projections with a bias; all: q, k, v and o
    lora: LoRASection | None = None  # on attention, feed-forward parts, experts or routers, which are then frozen
    sliding_window: Count = 0  # a token attends to this many tokens: itself and those just before it; 0: no limit
    rope_base: Annotated[float, Field(gt=0)] = 10000.0
    rope_scaling: RopeScaling | None = None
    layers: dict[str, LayerConfig] = Field({})  # layers that differ; keys: layer numbers such as "0" or "0,4-7"
    vocab_size: Positive | None = None  # rows of embedding and output; default: the number of ids of the tokenizers.
    # Rows beyond these ids (a padded vocabulary) are kept, but generation never chooses them
    tie_embeddings: bool = False  # share one matrix between embedding and output
    init_std: Annotated[float, Field(gt=0)] = 0.02
    embedding_init_std: Annotated[float, Field(gt=0)] | None = None  # default: init_std; about 1 for swin, docs/moma.md
    recompute: bool = False  # recompute each block's activations in the backward pass

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_keys(cls, layers: Any) -> Any:
        """Convert the keys to text, because YAML reads a key such as `0:` as a number."""
        return {str(key): value for key, value in layers.items()} if isinstance(layers, dict) else layers

    @model_validator(mode="after")
    def _layers(self):
        numbers = [number for key in self.layers for number in layer_numbers(key)]
        for number in numbers:
            if number >= self.num_layers:
                raise ValueError(f"layers: there is no layer {number}, num_layers={self.num_layers}")
            if numbers.count(number) > 1:
                raise ValueError(f"layers: layer {number} is given twice")
        if isinstance(self.ffn, MoEFFN) and not self.expert_layers:
            raise ValueError("layers: every layer is dense, so ffn must be of type dense")
        return self

    @model_validator(mode="after")
    def _heads(self):
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.size_per_head % 2:
            raise ValueError(f"the rotary embedding needs an even size per head, not {self.size_per_head}")
        if self.num_heads % self.query_groups:
            raise ValueError(f"num_query_groups={self.query_groups} does not divide num_heads={self.num_heads}")
        return self

    @model_validator(mode="after")
    def _lora_targets(self):
        for pattern in self.lora.targets if self.lora else ():
            if not any(target.partition(".")[0] in self._lora_parts for target in _named(pattern)):
                raise ValueError(f"lora.targets: the model has no '{pattern}', only {', '.join(self._lora_parts)}")
        of_experts = [target for target in LORA_TARGETS if target.startswith("experts.")]
        slices = self.ffn.slices if isinstance(self.ffn, MoEFFN) else 1
        if slices > 1 and self.lora and any(self.lora.has(target) for target in of_experts):
            raise ValueError(f"lora.targets: experts in slices (ffn.slices={slices}) cannot have LoRA")
        return self

    @property
    def _lora_parts(self) -> list[str]:
        """The parts of the model that LoRA can be added to.

        A part is the first component of names in LORA_TARGETS, such as "attention".
        """
        ffn = self.ffn
        dense = len(self.expert_layers) < self.num_layers
        experts = isinstance(ffn, MoEFFN) and isinstance(ffn.experts, SwiGLUExpertsConfig)
        shared = isinstance(ffn, MoEFFN) and ffn.shared_expert is not None
        parts = {"attention": True, "ffn": dense, "experts": experts, "shared_expert": shared}
        return [part for part, there in (parts | {"router": isinstance(ffn, MoEFFN)}).items() if there]

    @property
    def size_per_head(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_heads

    def ffn_of(self, layer: int) -> DenseFFN | MoEFFN:
        return self._own(layer).ffn or self.ffn

    def window_of(self, layer: int) -> int:
        """Return the size of a layer's sliding window, or 0 if the layer's attention has no window."""
        own = self._own(layer).sliding_window
        return self.sliding_window if own is None else own

    def _own(self, layer: int) -> LayerConfig:
        return next((own for key, own in self.layers.items() if layer in layer_numbers(key)), LayerConfig())

    @property
    def expert_layers(self) -> list[int]:
        """The indices of the layers with experts."""
        return [layer for layer in range(self.num_layers) if isinstance(self.ffn_of(layer), MoEFFN)]

    @property
    def depth_layers(self) -> range:
        """The indices of the layers with mixture-of-depths."""
        return range(0, self.num_layers if self.depth else 0, self.depth.every if self.depth else 1)
