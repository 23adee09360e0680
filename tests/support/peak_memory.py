"""The peak of a rank's resident memory while a model is built and filled, and the memory that it needs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.fragments import MASTER, fragments, kind_of
from moe_dist.checkpoint.init_from import init_from
from moe_dist.config.recipe import Config, InitFrom
from moe_dist.convert.pretrained import open_pretrained
from moe_dist.core.initial_values import all_new, none_new
from moe_dist.core.strict import validate
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from moe_dist.training.engine import Engine

Result = TypeVar("Result")
TINY = {"hidden_size": 64, "num_layers": 1, "ffn_size": 64, "vocabulary": 64}


@dataclass(frozen=True, kw_only=True)
class MemoryJob:
    """A model (a Mixtral of eight experts), its layout, and the source of its parameters."""

    hidden_size: int
    num_layers: int
    ffn_size: int
    vocabulary: int
    stage: int
    expert: int
    bf16: bool = True
    trainable: tuple[str, ...] = ("*.router.*",)
    lora: dict[str, Any] | None = None  # LoRA on attention
    recompute: bool = False
    source: Literal["seeds", "checkpoint", "folder"] = "seeds"
    path: str = ""  # of the checkpoint or the Hugging Face folder
    save: str | None = None  # write a checkpoint here afterwards
    on_meta: bool = True  # False: plant the fault that the model is built with all its values
    deepspeed: dict[str, Any] = field(default_factory=dict)  # further keys of zero_optimization

    def recipe(self) -> Config:
        router = {"type": "top_k", "num_experts": 8, "top_k": 2, "renormalize": True}
        model = {
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.hidden_size // 64,
            "norm": "pre",
            "qk_norm": False,
            "lora": self.lora,
            "recompute": self.recompute,
            "ffn": {"type": "moe", "hidden_size": self.ffn_size, "router": router},
        }
        raw = {
            "run": {"dir": "unused"},
            "data": {"shards": "unused", "text_tokenizer": "unused"},
            "model": model,
            "parallel": {"expert": self.expert},
            "trainable": self.trainable,
            "train": {"steps": 1, "global_batch_groups": 2},
            "schedule": {"peak_lr": 0.1},
            "deepspeed": {
                "optimizer": {"type": "AdamW"},
                "zero_optimization": {"stage": self.stage, **self.deepspeed},
                "bf16": {"enabled": self.bf16},
            },
        }
        return validate(Config, raw, "test")

    def start(self, layout: Layout) -> Engine:
        """Build the model and fill it from the source. Collective."""
        config = self.recipe()
        with torch.device("meta") if self.on_meta else nullcontext():
            model = Transformer(config.model, self.vocabulary, layout, seed=0)
        engine = make_engine(model, config, layout, all_new if self.source == "seeds" else none_new)
        if self.source == "checkpoint":
            checkpoint.load(self.path, engine, layout)
        if self.source == "folder":
            init_from(InitFrom(checkpoint=self.path), engine, layout, open_pretrained(self.path).tensors)
        return engine


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank: the peak above the baseline, and what the rank needs."""

    baseline: int
    peak: int
    share: int  # of the working parameters
    largest: int  # tensor, in float32, in which it is read; of experts, the rows of this rank
    optimizer: int  # for each trained element of the rank: a master, two moments and a gradient, in float32

    @property
    def needed(self) -> int:
        return self.share + self.largest + self.optimizer

    @property
    def ratio(self) -> float:
        return self.peak / self.needed


def measure(rank: int, job: MemoryJob) -> Measured:
    """Run a job on a fresh rank. A tiny engine before it imports what DeepSpeed imports late. Collective."""
    layout = make_layout(expert=job.expert, device=init_distributed())
    replace(job, **TINY, source="seeds").start(layout)
    baseline, peak, engine = peak_during(lambda: job.start(layout))
    if job.save is not None:
        state = {"config": {"model": job.recipe().model.model_dump(mode="json", exclude_unset=True)}}
        checkpoint.save(job.save, engine, layout, state=state)
    parameters = list(engine.module.parameters())
    return Measured(
        baseline=baseline,
        peak=peak,
        share=sum(_bytes(getattr(p, "ds_tensor", p)) for p in parameters),
        largest=max(getattr(p, "ds_numel", p.numel()) for p in parameters) * torch.float32.itemsize,
        optimizer=4 * sum(_bytes(f.tensor) for f in fragments(engine) if kind_of(f.name) == MASTER),
    )


def peak_during(function: Callable[[], Result]) -> tuple[int, int, Result]:
    """Call a function. Return the resident memory before it, by how much it rose at most, and the result."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    result = function()
    return before, resident("VmHWM") - before, result


def resident(key: str) -> int:
    """Return VmRSS (resident now) or VmHWM (its peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
