"""The recipe: one YAML file plus overrides, read strictly (core/strict.py) into one typed tree.

What a recipe alone can get wrong is found here, once. training/ checks what depends on the ranks or the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from moe_dist.config.deepspeed_section import DeepSpeedSection
from moe_dist.config.inheritance import read_recipe
from moe_dist.config.losses import LossesSection
from moe_dist.config.needs import Need
from moe_dist.config.renamed import check_names, with_new_names
from moe_dist.config.routers import RouterSection
from moe_dist.core.strict import Count, Fraction, Positive, Strict, apply_override, validate

Patterns = Annotated[tuple[str, ...], Field(strict=False)]  # of names; a list will do, also after a validator


class RunConfig(Strict):
    dir: str  # the run folder: config.yaml, metrics.jsonl, status.json, checkpoints/, tensorboard/, samples/
    resume: str = "auto"  # auto: newest complete checkpoint of run.dir; none: start fresh; or a checkpoint folder


class DataConfig(Strict):
    shards: str | tuple[str, ...]  # folder(s), brace-expanded tar paths or remote URLs, as webdataset takes them
    validation_shards: str | tuple[str, ...] | None = None  # default: validation/ beside train/, or a split by hash
    text_tokenizer: str  # SentencePiece .model file, or a Hugging Face folder with a tokenizer.json
    image_tokenizer: str | None = None  # folder of a trained VQ tokenizer or of Hugging Face ChameleonVQVAE weights
    sequence_length: Positive = 512
    group_sequences: Positive = 4  # packed sequences that compete together in expert-choice routing
    lanes: Positive = 8  # fixed number of data streams; the data-parallel size must divide it
    image_first: Fraction = 0.5  # share of pairs in image-before-text order
    caption_dropout: Fraction = 0.1  # share of pairs whose caption is left out (guidance needs it)
    image_fraction: Fraction | None = None  # image share of a group's tokens; None: as the data comes
    neighbours: str | None = None  # store that launch/align.py makes, for losses.manifold (docs/roma.md)
    max_bad_fraction: Fraction = 0.01  # the run fails if more samples than this cannot be decoded


class DenseFFN(Strict):
    type: Literal["dense"]
    hidden_size: Positive


class LoRAConfig(Strict):
    """Low-rank deltas beside frozen weights, (alpha / rank) B A dropout(x) (Hu et al., arXiv 2106.09685)."""

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
    slices: Positive = 1  # each expert is held as so many slices of its hidden size, which are placed like experts of
    # their own, so that ranks share one expert (docs/moma.md, "Balance over ranks")
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
    """Mixture-of-depths (MoMa, arXiv 2407.21770): some blocks work on a share of the tokens, the others pass by."""

    capacity: Annotated[float, Field(gt=0, le=1)] = 0.25  # share of the competing tokens that such a block admits
    every: Positive = 2  # every so many blocks one is such, from the first
    scope: Literal["group", "modality", "sequence"] = "group"  # who competes: a selection group (the paper's batch),
    # each modality of it by itself (so that both are admitted at the same share), or a packed sequence
    auxiliary: bool = False  # a second gate beside each, for causal inference


class ModelConfig(Strict):
    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    num_query_groups: Positive | None = None  # keys and values, each shared by as many heads; default: num_heads
    head_size: Positive | None = None  # default: hidden_size / num_heads
    ffn: Annotated[DenseFFN | MoEFFN, Field(discriminator="type")]
    depth: DepthConfig | None = None  # mixture-of-depths; None: every block works on all tokens
    norm: Literal["swin", "pre"] = "swin"  # swin: x + norm(f(x)), Chameleon; pre: x + f(norm(x))
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    qk_norm: bool = True
    attention_lora: LoRAConfig | None = None  # on the projections q, k, v and o, which are frozen then
    rope_base: Annotated[float, Field(gt=0)] = 10000.0
    tie_embeddings: bool = False  # one matrix for input embedding and output
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
        """The layers with mixture-of-depths."""
        return range(0, self.num_layers if self.depth else 0, self.depth.every if self.depth else 1)


class InitFrom(Strict):
    """Start from the parameters of an earlier stage's checkpoint; a plain path stands for `checkpoint` alone.

    Patterns match whole parameter names, `*` any text (docs/stages.md).
    """

    checkpoint: str  # a checkpoint folder, or a run folder: its newest complete checkpoint
    rename: dict[str, str] = Field({})  # the checkpoint's names -> the model's; what a `*` stands for is carried over
    new: Patterns = ()  # parameters of the model that keep their own initial values
    left_out: Patterns = ()  # parameters of the checkpoint that are not used
    data_position: bool = False  # go on in the data where the checkpoint's run had stopped; false: from their beginning

    @model_validator(mode="before")
    @classmethod
    def _plain_path(cls, data: Any) -> Any:
        return {"checkpoint": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _as_many_stars(self):
        for old, new in self.rename.items():
            if old.count("*") != new.count("*"):
                raise ValueError(f"rename '{old}: {new}' has not as many * on both sides")
        return self


class ParallelConfig(Strict):
    expert: Positive = 1  # ranks over which the experts are spread


class TrainConfig(Strict):
    steps: Positive  # the schedule's horizon
    stop_after: Positive | None = None  # stop early at this step; the schedule stays as it is
    global_batch_groups: Positive  # selection groups in one optimizer step, over all ranks
    micro_batch_groups: Positive = 1  # selection groups in one forward pass of one rank
    non_finite: Literal["stop", "skip"] = "stop"  # what a non-finite loss or gradient does
    max_skipped: Count = 10  # with skip: the run fails after this many skipped steps
    deterministic: bool = False  # on a GPU: the same bits in every run, also when resumed; slower (docs/gpu.md)


class ScheduleConfig(Strict):
    type: Literal["linear", "cosine"] = "linear"
    warmup_steps: Count = 0
    peak_lr: Annotated[float, Field(ge=0)]
    end_lr: Annotated[float, Field(ge=0)] = 1e-6  # at train.steps


class EvalConfig(Strict):
    every: Count = 100  # steps; 0: never (the end of a run always evaluates unless 0)
    groups: Positive = 16  # selection groups of the held-out split in one evaluation


class CheckpointConfig(Strict):
    every: Count = 100  # steps; 0: only at the end
    keep: Positive = 2  # the newest; older ones are removed
    keep_every: Count = 0  # steps: those of a multiple of it stay as well; 0: none
    asynchronous: bool = True  # training goes on while one is written; costs host memory (docs/checkpoints.md)


class TelemetryConfig(Strict):
    tensorboard: bool = True
    wandb_project: str | None = None
    every: Positive = 1  # steps between two lines of metrics.jsonl


class HealthConfig(Strict):
    # A step, an evaluation or a checkpoint that takes longer ends the run, with stacks in RUN/stacks (0: never). Below
    # the ten minutes after which NCCL gives up without them.
    hang_seconds: Annotated[float, Field(ge=0)] = 540
    straggler_every: Positive = 50  # steps between two looks for a slow rank
    straggler_factor: Annotated[float, Field(gt=1)] = 1.5  # slow: so many times the others' own time in a step


class Config(Strict):
    """A whole recipe."""

    seed: int = 0
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    init_from: InitFrom | None = None  # not read when a run resumes
    trainable: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)  # patterns of names; all else is frozen
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    losses: LossesSection = Field({})  # terms beside the language loss
    schedule: ScheduleConfig
    deepspeed: DeepSpeedSection
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    health: HealthConfig = HealthConfig()
    needs: Annotated[tuple[Need, ...], Field(strict=False)] = ()  # what must exist first (config/prerequisites.py)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `section.key=value` overrides (values are YAML). Raises UserError."""
    return _resolve(read_recipe(Path(path)), overrides, str(path))


def load_stored_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read what save_config wrote, also in an earlier version whose keys had other names. Raises UserError."""
    return _resolve(with_new_names(read_recipe(Path(path))), overrides, str(path))


def stored_config(data: dict[str, Any], where: str) -> Config:
    """Return a config that a checkpoint holds, also of an earlier version. Raises UserError."""
    return validate(Config, with_new_names(data), where)


def _resolve(data: dict[str, Any], overrides: Sequence[str], where: str) -> Config:
    for override in overrides:
        apply_override(data, override)
    check_names(data, where)
    return validate(Config, data, where)


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved recipe as YAML that load_config reads back to an equal value."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
