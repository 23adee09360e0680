"""The models of the efficiency study: dense and sparse at equal active FLOPs per token (benchmarks/moma_eta.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.progress import Progress, TaskID

from moe_dist.core.batch import MODALITIES
from moe_dist.evaluate.efficiency import eta, smoothed
from moe_dist.metrics.curves import read_run
from moe_dist.metrics.run_folder import RunFolder
from runs import ENVIRONMENT, ROOT, expert_choice, moma

RUNS = ROOT / "runs" / "benchmark" / "moma_eta"
CORPORA = ("emoji", "clipart", "text")
TOKENIZERS = "data/eta_tokenizers"
RATE = 8e-3
WIDTH, FFN = 64, 176  # model width; feed-forward width: 2/3 of 4 times that, as in the paper's table
CAUSAL_STEPS = 240  # of the stage that trains auxiliary routers
WINDOW = 40  # steps over which training losses are averaged
LOSSES = {"overall": "loss", **{modality: f"loss/{modality}" for modality in MODALITIES}}
NAMES = ("dense", "moe_8x", "1t1i", "4t4i", "MoD 4t4i")
DEEPER = 7  # number of layers with mixture-of-depths, for the FLOPs of 4 layers without


def at_constant(rate: float) -> list[str]:
    """Return the settings of a learning rate that stays constant after warm-up."""
    return [f"schedule={{type: linear, warmup_steps: 40, peak_lr: {rate}, end_lr: {rate}}}"]


BASE = [
    f"data.shards=[{', '.join(f'data/{name}' for name in CORPORA)}]",
    f"data.text_tokenizer={TOKENIZERS}/text.model",
    f"data.image_tokenizer={TOKENIZERS}/vq",
    "data.image_fraction=0.5",
    f"model.hidden_size={WIDTH}",
    "model.embedding_init_std=1.0",
    f"model.ffn.hidden_size={FFN}",
    "parallel.expert=1",
    "train.micro_batch_groups=8",
    "deepspeed.optimizer.params.weight_decay=0.1",
    *at_constant(RATE),
    "eval.every=0",
    "checkpoint.every=40",
    "checkpoint.keep=1",
    "telemetry.tensorboard=false",
]


def router(name: str, auxiliary: bool) -> list[str]:
    """Return the settings of a sparse variant. auxiliary: with the routers for causal inference."""
    if name == "moe_8x":
        return [f"model.ffn.router={expert_choice(8, auxiliary=auxiliary)}"]
    count = 1 if name == "1t1i" else 4
    settings = [f"model.ffn.router={moma(count, count, auxiliary=auxiliary)}"]
    if name == "MoD 4t4i":
        depth = f"{{capacity: 0.25, scope: group, auxiliary: {str(auxiliary).lower()}}}"
        settings += [f"model.num_layers={DEEPER}", f"model.depth={depth}"]
    return settings


def variant(name: str, auxiliary: bool = False) -> list[str]:
    return [f"model.ffn={{type: dense, hidden_size: {FFN}}}"] if name == "dense" else router(name, auxiliary)


def prepare() -> None:
    """Build the corpora and tokenizers that are missing."""
    for corpus in CORPORA:
        command = [sys.executable, "launch/prepare_data.py", f"corpus={corpus}", f"out=data/{corpus}"]
        subprocess.run(command, cwd=ROOT, check=True)
    if not (ROOT / TOKENIZERS / "vq" / "quality.json").exists():
        shards = f"shards=[{', '.join(f'data/{name}' for name in CORPORA)}]"
        settings = [shards, f"out={TOKENIZERS}", "vocab_size=2048", "training.steps=500"]
        subprocess.run([sys.executable, "launch/train_tokenizers.py", *settings], cwd=ROOT, check=True)


class Study:
    """The runs of the study, as folders of `runs/`, and their progress."""

    def __init__(self, steps: int, seeds: Sequence[int], overrides: Sequence[str], runs: Path = RUNS):
        self.steps, self.seeds, self.overrides, self.runs = steps, seeds, list(overrides), runs

    def folder(self, name: str, seed: int, stage: str = "") -> RunFolder:
        return RunFolder(self.runs / f"{name.replace(' ', '_')}_{seed}{stage}")

    def run(self, jobs: int) -> None:
        """Train one seed after another, so that an unfinished study has complete comparisons."""
        with Progress() as progress, ThreadPoolExecutor(jobs) as pool:
            bar = progress.add_task("moma_eta", total=len(NAMES) * len(self.seeds))
            todo = [(name, seed) for seed in self.seeds for name in NAMES]
            for done in [pool.submit(self._one, name, seed, progress, bar) for name, seed in todo]:
                done.result()

    def _one(self, name: str, seed: int, progress: Progress, bar: TaskID) -> None:
        self.train(name, seed)
        if name != "dense":
            self._train_causal_routers(name, seed)
        if not self._is_evaluated(name, seed):
            folder = self.evaluated(name, seed)
            self._python(folder, ["launch/evaluate.py", str(folder.path), "eval.groups=64"])
        progress.console.print(f"{name}, seed {seed}: done")
        progress.advance(bar)

    def train(self, name: str, seed: int) -> None:
        self._train(self.folder(name, seed), [*variant(name), f"train.steps={self.steps}", f"seed={seed}"])

    def _train_causal_routers(self, name: str, seed: int) -> None:
        main = self.folder(name, seed)
        init = f"init_from={{checkpoint: {main.path.relative_to(ROOT)}, new: ['*.auxiliary.*']}}"
        settings = [*variant(name, auxiliary=True), init, "trainable=['*.auxiliary.*']", f"seed={seed}"]
        settings += ["losses={causal_routers: {weight: 1.0}}", f"train.steps={CAUSAL_STEPS}"]
        self._train(self.evaluated(name, seed), settings)

    def _train(self, folder: RunFolder, settings: list[str]) -> None:
        recipe = ["launch/train.py", "--config", "configs/moma_quickstart.yaml", *self._ordered(settings)]
        self._python(folder, [*recipe, f"run.dir={folder.path.relative_to(ROOT)}"])

    def _ordered(self, settings: list[str]) -> list[str]:
        """Put a setting that replaces a section before those that set a key in it."""
        own = {setting.partition("=")[0] for setting in settings}
        base = [setting for setting in BASE if not any(setting.startswith(f"{key}.") for key in own)]
        return [*base, *settings, *self.overrides]

    def _python(self, folder: RunFolder, command: list[str]) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        with (folder.path / "study.log").open("a") as log:
            done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, env=ENVIRONMENT)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: see {log.name}")

    @property
    def last(self) -> int:
        """Number of steps in the last fifth of training."""
        return self.steps // 5

    def lines(self, name: str, seed: int) -> list[dict[str, float]]:
        """Read the metrics of every step of a run."""
        return read_run(self.folder(name, seed).path).lines

    def curve(self, name: str, seed: int) -> dict[str, np.ndarray]:
        """Return FLOPs, tokens and losses of a run, smoothed."""
        lines = self.lines(name, seed)
        flops = np.cumsum([line["model_flops_per_second"] * line["step_seconds"] for line in lines])
        values = {"flops": flops, "tokens": [line["tokens"] for line in lines]}
        values |= {title: [line[key] for line in lines] for title, key in LOSSES.items()}
        return {key: smoothed(np.asarray(value, dtype=float), WINDOW) for key, value in values.items()}

    def evaluated(self, name: str, seed: int) -> RunFolder:
        """Return the run whose held-out loss counts: the stage that trains causal routers, if there is one, after
        `steps` of the main run.
        """
        return self.folder(name, seed, "" if name == "dense" else f"_causal_{self.steps}")

    def evaluation(self, name: str, seed: int) -> dict[str, float]:
        file = self.evaluated(name, seed).path / "evaluation.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def _is_evaluated(self, name: str, seed: int) -> bool:
        return self.evaluation(name, seed).get("step") == (self.steps if name == "dense" else CAUSAL_STEPS)

    def done(self, name: str) -> list[int]:
        """Return the seeds with which both the model and the dense model are trained and evaluated."""
        return [seed for seed in self.seeds if all(self._is_evaluated(of, seed) for of in ("dense", name))]

    @property
    def names(self) -> list[str]:
        """Return the models that are done with at least one seed."""
        return [name for name in NAMES if self.done(name)]

    def etas(self, name: str, title: str) -> np.ndarray:
        """[seed, point of the dense curve]: eta of the model."""
        found = []
        for seed in self.done(name):
            dense, sparse = self.curve("dense", seed), self.curve(name, seed)
            found.append(eta(dense["flops"], dense[title], sparse["flops"], sparse[title]))
        return np.stack(found)
