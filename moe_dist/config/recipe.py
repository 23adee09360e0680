"""The typed tree of a recipe's settings, with every key's default.

A YAML file plus overrides is read into this tree strictly (core/strict.py). Errors that depend only on the recipe are
found here. Errors that depend on the ranks or the data are found in training/.
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
from moe_dist.config.model_section import ModelConfig
from moe_dist.config.needs import Need
from moe_dist.config.renamed import check_names, with_new_names
from moe_dist.core.paths import Paths, PathText
from moe_dist.core.strict import Count, Fraction, Positive, Strict, Width, apply_override, validate

Patterns = Annotated[tuple[str, ...], Field(strict=False)]  # name patterns; not strict, so that a list is accepted


class RunConfig(Strict):
    dir: PathText  # the run folder: config.yaml, metrics.jsonl, status.json, checkpoints/, tensorboard/, samples/
    resume: PathText = "auto"  # auto: newest complete checkpoint of run.dir; none: start fresh; or a checkpoint folder,
    # or another run's folder: its newest complete checkpoint


class DataConfig(Strict):
    shards: Paths  # folder(s), brace-expanded tar paths or remote URLs, as webdataset takes them
    validation_shards: Paths | None = None  # default: validation/ next to train/, or a split by hash
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05  # of the samples, in a split by hash
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None  # samples drawn from each entry of shards
    text_tokenizer: PathText  # SentencePiece .model file, or a Hugging Face folder with a tokenizer.json
    image_tokenizer: PathText | None = None  # folder of a trained VQ tokenizer or Hugging Face ChameleonVQVAE weights
    sequence_length: Positive = 512
    group_sequences: Positive = 4  # packed sequences that compete together in expert-choice routing
    lanes: Width = 8  # fixed number of data streams; the data-parallel size must divide it
    image_first: Fraction = 0.5  # fraction of pairs in image-before-text order
    caption_dropout: Fraction = 0.1  # fraction of pairs without their caption (guidance needs it)
    image_fraction: Fraction | None = None  # fraction of image tokens in a group; None: as in the data
    neighbours: PathText | None = None  # store that launch/align.py makes, for losses.manifold (docs/roma.md)
    max_bad_fraction: Fraction = 0.01  # the run fails if more samples than this cannot be decoded or lose a part
    expect: Literal["pairs", "images", "text", "any"] = "any"  # what every training sample has to hold (docs/data.md)

    @model_validator(mode="after")
    def _one_weight_each(self):
        entries = 1 if isinstance(self.shards, str) else len(self.shards)
        if self.weights is not None and len(self.weights) != entries:
            raise ValueError(f"weights has {len(self.weights)} entries, but shards has {entries}")
        if self.weights is not None and self.image_fraction is not None:
            raise ValueError("weights and image_fraction cannot be combined: leave one of them out")
        return self


class InitFrom(Strict):
    """The section `init_from`: the earlier stage's checkpoint from which a run takes its initial parameters.

    If a recipe gives a path instead of a mapping, the path is used as `checkpoint`, and the other keys have their
    defaults. Patterns match whole parameter names; `*` matches any text (docs/stages.md).
    """

    checkpoint: PathText  # a checkpoint folder, or a run folder for its newest complete checkpoint
    rename: dict[str, str] = Field({})  # the checkpoint's names -> the model's; text matched by `*` is kept
    new: Patterns = ()  # parameters of the model that keep their own initial values
    left_out: Patterns = ()  # parameters of the checkpoint that are not used
    null_gates: Literal["copied", "fresh"] | None = None  # rows of null experts in a gate that has none in the
    # checkpoint: copies of the true experts' rows, or their own initial values (AdaMoE)
    data_position: bool = False  # continue in the data where the checkpoint's run stopped; false: start over

    @model_validator(mode="before")
    @classmethod
    def _plain_path(cls, data: Any) -> Any:
        return {"checkpoint": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _as_many_stars(self):
        for old, new in self.rename.items():
            if old.count("*") != new.count("*"):
                raise ValueError(f"rename '{old}: {new}' must have the same number of * on both sides")
        return self


class ParallelConfig(Strict):
    expert: Positive = 1  # ranks over which the experts are spread


class TrainConfig(Strict):
    steps: Positive  # horizon of the schedule
    stop_after: Positive | None = None  # stop early at this step, with an unchanged schedule
    global_batch_groups: Positive  # selection groups in one optimizer step, over all ranks
    micro_batch_groups: Positive = 1  # selection groups in one forward pass of one rank
    non_finite: Literal["stop", "skip"] = "stop"  # response to a non-finite loss or gradient
    max_skipped: Count = 10  # with skip: the run fails once more steps than this were skipped
    reach_steps: Count = (
        10  # by then, a gradient must have reached every trained parameter (docs/stages.md); 0: no check
    )
    deterministic: bool = False  # bitwise repeatable runs on a GPU, also when resumed; slower (docs/gpu.md)


class ScheduleConfig(Strict):
    type: Literal["linear", "cosine"] = "linear"
    warmup_steps: Count = 0
    peak_lr: Annotated[float, Field(ge=0)]
    end_lr: Annotated[float, Field(ge=0)] = 1e-6  # at train.steps


class EvalConfig(Strict):
    every: Count = 100  # steps; 0: never; otherwise the last step also evaluates
    groups: Positive = 16  # selection groups of the held-out split in one evaluation
    tasks: Annotated[tuple[PathText, ...], Field(strict=False)] = ()  # tasks of lm_eval: names or YAML files
    tasks_every: Positive | None = None  # steps between two evaluations of the tasks; default: every
    task_limit: Positive | None = None  # documents of each task; default: all

    @model_validator(mode="after")
    def _when(self):
        if self.tasks and not self.steps_between_tasks:
            raise ValueError("tasks are never evaluated with every=0: set tasks_every")
        return self

    @property
    def steps_between_tasks(self) -> int:
        """The number of steps between two evaluations of the tasks; 0 if there are no tasks."""
        return (self.tasks_every or self.every) if self.tasks else 0


class CheckpointConfig(Strict):
    every: Count = 100  # steps; 0: only at the end
    keep: Positive = 2  # number of newest checkpoints to keep
    keep_every: Count = 0  # steps: also keep checkpoints at multiples of this; 0: none
    asynchronous: bool = True  # training continues during a write; costs host memory (docs/checkpoints.md)


class TelemetryConfig(Strict):
    tensorboard: bool = True
    wandb_project: str | None = None
    every: Positive = 1  # steps between two lines of metrics.jsonl


class HealthConfig(Strict):
    # If a step, an evaluation or a checkpoint takes longer, the run ends with stacks in RUN/stacks (0: never). The
    # default is below NCCL's timeout of ten minutes, which would leave no stacks.
    hang_seconds: Annotated[float, Field(ge=0)] = 540
    straggler_every: Positive = 50  # steps between two checks for a slow rank
    straggler_factor: Annotated[float, Field(gt=1)] = 1.5  # slow: own time per step exceeds the others' by this


def _trained_by_default(settings: dict[str, Any]) -> tuple[str, ...]:
    """Return the default of `trainable`. settings: the validated sections that precede it in the recipe."""
    model = settings.get("model")
    return ("*",) if model is None or model.lora is None else ("*.lora.*",)


class Config(Strict):
    """All settings of a recipe, one field per section."""

    seed: int = 0
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    init_from: InitFrom | None = None  # not read when a run resumes
    # Name patterns; other parameters are frozen. The default is ["*.lora.*"] with model.lora, otherwise ["*"].
    trainable: Annotated[tuple[str, ...], Field(min_length=1, default_factory=_trained_by_default)]
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    losses: LossesSection = Field({})  # terms in addition to the language loss
    schedule: ScheduleConfig
    deepspeed: DeepSpeedSection
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    health: HealthConfig = HealthConfig()
    needs: Annotated[tuple[Need, ...], Field(strict=False)] = ()  # what must exist first (config/prerequisites.py)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe, apply overrides of the form `section.key=value` (values are YAML), and validate it.

    Raises UserError if the recipe cannot be read, or if a key or value is invalid.
    """
    return _resolve(read_recipe(Path(path)), overrides, str(path))


def load_stored_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a file that save_config wrote, and apply overrides. Old keys from earlier versions are also accepted.

    Raises UserError if the file cannot be read, or if a key or value is invalid.
    """
    return _resolve(with_new_names(read_recipe(Path(path))), overrides, str(path))


def stored_config(data: dict[str, Any], where: str) -> Config:
    """Validate a recipe stored in a checkpoint. Old keys from earlier versions are also accepted.

    where: the beginning of the error message. Raises UserError if a key or value is invalid.
    """
    return validate(Config, with_new_names(data), where)


def stored_model(config: dict[str, Any], where: str) -> ModelConfig:
    """Validate and return the section `model` of a recipe stored in a checkpoint.

    Old keys are accepted, and errors are raised, as in stored_config.
    """
    return validate(ModelConfig, with_new_names(config)["model"], where, "model")


def _resolve(data: dict[str, Any], overrides: Sequence[str], where: str) -> Config:
    for override in overrides:
        apply_override(data, override)
    check_names(data, where)
    return validate(Config, data, where)


def save_config(config: Config, path: str | Path) -> None:
    """Write a recipe with all its settings as YAML. Reading the file with load_config gives an equal Config."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
