"""One model of the efficiency study on one GPU: trains through the engine and saves its curve as it runs."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch

from gpu.eta_data import Packed, read_inputs
from gpu.eta_job import LOSSES, Job
from gpu.findings import ROOT
from moe_dist.config.recipe import Config, load_config
from moe_dist.core.batch import Batch
from moe_dist.evaluate.perplexity import evaluate
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.metrics.step_counts import StepCounts
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from moe_dist.training.engine import StepResult
from moe_dist.training.schedule import learning_rate
from moma_study import variant

WIDTH, FFN, LAYERS = 256, 688, 4  # FFN: 2/3 of 4 times the width, a multiple of 8
SAVE_EVERY = 5.0  # seconds
SIZES = [f"model.hidden_size={WIDTH}", f"model.num_layers={LAYERS}", "model.num_heads=4"]
BASE = [
    *SIZES,
    "model.embedding_init_std=1.0",
    "parallel.expert=1",
    "train.global_batch_groups=1",
    "train.micro_batch_groups=1",
    "deepspeed.bf16={enabled: true}",
    "deepspeed.optimizer.params.weight_decay=0.1",
]


class Curve:
    """Losses, tokens and FLOPs of a run, by step and by evaluation, written to a file as they come."""

    def __init__(self, job: Job, about: dict[str, Any]):
        self._file, self._saved = Path(job.file), 0.0
        self.content = {
            "settings": job.settings(),
            **about,
            "done": False,
            "reached": 0,
            "train": {},
            "held_out": {},
        }

    def add(self, kind: str, point: dict[str, float]) -> None:
        for key, value in point.items():
            self.content[kind].setdefault(key, []).append(float(f"{value:.7g}"))
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Replace the file atomically, so that a killed process leaves its last state."""
        beside = self._file.with_suffix(".part")
        beside.write_text(json.dumps(self.content) + "\n")
        beside.replace(self._file)
        self._saved = time.monotonic()


def run(job: Job) -> None:
    """Train a model to its last step or the deadline. The environment names this process's rank and port."""
    device = init_distributed()
    train, held_out = read_inputs(Path(job.inputs))
    if len(train) < job.steps:
        raise SystemExit(f"{job.inputs} holds {len(train)} batches, too few for {job.steps} steps: lower --tokens")
    config = recipe(job, train)
    Training(job, config, train, held_out, device).loop()


def recipe(job: Job, train: Packed) -> Config:
    warm_up = max(1, job.steps // 20)
    settings = [
        *BASE,
        *variant(job.name),
        f"model.ffn.hidden_size={FFN}",
        f"train.steps={job.steps}",
        f"data.group_sequences={train.batch_tokens // train.facts['sequence_length']}",
        f"data.sequence_length={train.facts['sequence_length']}",
        f"schedule={{type: linear, warmup_steps: {warm_up}, peak_lr: {job.rate}, end_lr: {job.rate / 100}}}",
        "run.dir=none",
    ]
    return load_config(ROOT / "configs" / "moma_quickstart.yaml", [*settings, *job.overrides])


class Training:
    """The model, engine and data of one training job."""

    def __init__(self, job: Job, config: Config, train: Packed, held_out: Packed, device: torch.device):
        self.job, self.config, self.train = job, config, train
        self.layout = make_layout(expert=1, device=device)
        self.vocabulary = train.facts["vocab_size"]
        model = Transformer(config.model, self.vocabulary, self.layout, config.seed)
        self.engine = make_engine(model, config, self.layout)
        self.held_out_split = [held_out.batch(number).to(device) for number in range(len(held_out))]
        self.flops = self.tokens = 0
        self.curve = Curve(job, self._about(held_out, sum(p.numel() for p in model.parameters())))

    def _about(self, held_out: Packed, parameters: int) -> dict[str, Any]:
        once = self.engine.module.num_parameters(experts=1)
        return {
            "machine": machine(self.layout.device),
            "date": str(date.today()),
            "beside": self.job.beside,
            "command": self.job.command,
            "parameters": parameters,
            "parameters_of_one_expert": int(once),
            "batch_tokens": self.train.batch_tokens,
            "facts": self.train.facts,
            "times_seen": self.train.times_seen(self.job.steps),
            "held_out_tokens": int(sum(int(batch.loss_mask_T.sum()) for batch in self.held_out_split)),
            "model": self.config.model.model_dump(mode="json"),
        }

    def loop(self) -> None:
        """Train. At the deadline stop and keep the curve so far."""
        steps, points = self.job.steps, self.job.evaluations
        due = {round(steps * (number + 1) / points) for number in range(points)}
        started = time.monotonic()
        for step, batch in enumerate(ahead(self.train, steps)):
            if time.time() > self.job.deadline:
                break
            self._step(step, batch, started)
            self.curve.content["reached"] = step + 1
            if step + 1 in due:
                self._evaluate(step + 1)
        self.curve.content["done"] = self.curve.content["reached"] == steps
        self.curve.content["seconds"] = round(time.monotonic() - started, 1)
        self.curve.save()

    def _step(self, step: int, batch: Batch, started: float) -> None:
        lr = learning_rate(step, config=self.config.schedule, steps=self.job.steps)
        context = Context(layout=self.layout, group_sequences=self.config.data.group_sequences)
        objective = make_objective({}, context, step)
        result = self.engine.train_step(
            [batch], objective, lr, lambda batch, output: StepCounts.of(batch, output, self.layout)
        )
        assert result.counted is not None
        self.flops += result.counted.flops(cast(Transformer, self.engine.module))
        self.tokens += result.counts["loss"]
        self.curve.add("train", self._place() | means(result) | {"seconds": time.monotonic() - started})

    def _evaluate(self, step: int) -> None:
        """Record the held-out loss with the routing of training, which is not causal."""
        found = evaluate(self.engine.eval_forward, self.held_out_split, self.layout)
        losses = {name: found[f"eval/{name}"] for name in LOSSES}
        self.curve.add("held_out", {"step": step} | self._place() | losses)
        print(f"{self.job.name}, rate {self.job.rate:g}, step {step}: held-out {losses['loss']:.3f}", flush=True)

    def _place(self) -> dict[str, float]:
        return {"tokens": self.tokens, "flops": self.flops}


def ahead(packed: Packed, steps: int) -> Iterator[Batch]:
    """Yield the first `steps` batches. A thread builds each batch while training uses the one before."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(packed.batch, 0)
        for number in range(steps):
            batch = coming.result()
            if number + 1 < steps:
                coming = thread.submit(packed.batch, number + 1)
            yield batch


def means(result: StepResult) -> dict[str, float]:
    return {name: result.loss_sums[name] / max(result.counts[name], 1) for name in LOSSES}


def machine(device: torch.device) -> str:
    """Describe this machine in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    card = f"one {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "no GPU"
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    return f"{card}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}, {versions}"
