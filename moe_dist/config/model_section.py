"""The section `model` of a recipe: the architecture, with every key's default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_dist.config.routers import RouterSection
from moe_dist.core.strict import Positive, Strict


class DenseFFN(Strict):
    type: Literal["dense"]
    hidden_size: Positive


class LoRAConfig(Strict):
    """Settings of LoRA (Hu et al., arXiv 2106.09685).

    LoRA adds (alpha / rank) B A dropout(x) to the output of a linear layer whose weight is frozen. A and B are trained.
    """

    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class SwiGLUExpertsConfig(Strict):
    type: Literal["swiglu"] = "swiglu"


class LoRAExpertsConfig(LoRAConfig):
    type: Literal["lora"]


class MoEFFN(Strict):
    type: Literal["moe"]
    hidden_size: Positive  # of one expert; with LoRA experts, of the dense FFN that they share
    experts: Annotated[SwiGLUExpertsConfig | LoRAExpertsConfig, Field(discriminator="type")] = SwiGLUExpertsConfig()
    slices: Positive = 1  # number of slices of each expert's hidden size. Slices are placed like experts, so that
    # ranks can share one expert (docs/moma.md, "Balance over ranks")
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


class ModelConfig(Strict):
    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    num_query_groups: Positive | None = None  # key-value heads, each shared by equally many heads; default: num_heads
    head_size: Positive | None = None  # default: hidden_size / num_heads
    ffn: Annotated[DenseFFN | MoEFFN, Field(discriminator="type")]
    depth: DepthConfig | None = None  # mixture-of-depths; None: every block processes all tokens
    norm: Literal["swin", "pre"] = "swin"  # swin: x + norm(f(x)), Chameleon; pre: x + f(norm(x))
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    qk_norm: bool = True
    attention_lora: LoRAConfig | None = None  # on the projections q, k, v and o, which are then frozen
    rope_base: Annotated[float, Field(gt=0)] = 10000.0
    tie_embeddings: bool = False  # share one matrix between embedding and output
    init_std: Annotated[float, Field(gt=0)] = 0.02
    embedding_init_std: Annotated[float, Field(gt=0)] | None = None  # default: init_std; about 1 for swin, docs/moma.md
    recompute: bool = False  # recompute each block's activations in the backward pass

    @model_validator(mode="after")
    def _heads(self):
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.size_per_head % 2:
            raise ValueError(f"the rotary embedding needs an even size per head, not {self.size_per_head}")
        if self.num_heads % self.query_groups:
            raise ValueError(f"num_query_groups={self.query_groups} does not divide num_heads={self.num_heads}")
        return self

    @property
    def size_per_head(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_heads

    @property
    def depth_layers(self) -> range:
        """The indices of the layers with mixture-of-depths."""
        return range(0, self.num_layers if self.depth else 0, self.depth.every if self.depth else 1)
