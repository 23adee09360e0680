"""MoMa's efficiency table in small: how much arithmetic sparse models save against dense at the same training loss.

  python benchmarks/moma_eta.py [--steps 640] [--seeds 0 1] [--jobs 2] [--write-only] [section.key=value ...]

Trains dense, moe_8x, MoMa 1t1i and 4t4i, and mixture-of-depths + 4t4i, at equal active FLOPs a token, on emoji, clip
art and texts, for each seed on the same data in the same order; then the auxiliary routers of each sparse model, for
its held-out loss with causal routing. Builds its data on first use. Resumable: a run goes on from its checkpoint, and
what is done is not done again. --jobs runs train at a time, one thread each. --write-only trains nothing: it writes
down what is done so far. Writes the table, the picture and the curves: benchmarks/results/<date>-moma_eta.md, .png and
.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.progress import Progress, TaskID

from moe_dist.batch import MODALITIES
from moe_dist.evaluate.efficiency import eta, smoothed
from moe_dist.telemetry.report import read_run
from moe_dist.telemetry.run_folder import RunFolder
from runs import ROOT, expert_choice, moma, table, write_result

RUNS = ROOT / "runs" / "benchmark" / "moma_eta"
CORPORA = ("emoji", "clipart", "text")
TOKENIZERS = "data/eta_tokenizers"
RATE = 8e-3  # the best of 2e-3, 4e-3 and 8e-3 for dense and for sparse models
WIDTH, FFN = 64, 176  # of the model, and of a feed-forward part: 2/3 of 4 times that, as in the paper's table
CAUSAL_STEPS = 240  # of the stage that trains auxiliary routers
WINDOW = 40  # steps over which training losses are averaged
LOSSES = {"overall": "loss", **{modality: f"loss/{modality}" for modality in MODALITIES}}
COLOURS = {
    "dense": "#5b6770", "moe_8x": "#c98a1b", "1t1i": "#8a5fa8", "4t4i": "#0b6fa4", "MoD 4t4i": "#d1495b",
}  # fmt: skip
DEEPER = 7  # layers with mixture-of-depths: the FLOPs of 4 whole ones
BASE = [
    f"data.shards=[{', '.join(f'data/{name}' for name in CORPORA)}]",
    f"data.text_tokenizer={TOKENIZERS}/text.model", f"data.image_tokenizer={TOKENIZERS}/vq", "data.image_fraction=0.5",
    f"model.hidden_size={WIDTH}", "model.embedding_init_std=1.0", f"model.ffn.hidden_size={FFN}",
    "parallel.expert=1", "train.micro_batch_groups=8", "deepspeed.optimizer.params.weight_decay=0.1",
    f"schedule={{type: linear, warmup_steps: 40, end_lr: {RATE}}}", f"deepspeed.optimizer.params.lr={RATE}",
    "eval.every=0", "checkpoint.every=40", "checkpoint.keep=1", "telemetry.tensorboard=false",
]  # fmt: skip


def router(name: str, auxiliary: bool) -> list[str]:
    """Settings of a sparse variant; auxiliary: with the routers for causal inference."""
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
    """Corpora and tokenizers, where they are missing."""
    for corpus in CORPORA:
        command = [sys.executable, "launch/prepare_data.py", f"corpus={corpus}", f"out=data/{corpus}"]
        subprocess.run(command, cwd=ROOT, check=True)
    if not (ROOT / TOKENIZERS / "vq" / "quality.json").exists():
        shards = f"shards=[{', '.join(f'data/{name}' for name in CORPORA)}]"
        settings = [shards, f"out={TOKENIZERS}", "vocab_size=2048", "training.steps=500"]
        subprocess.run([sys.executable, "launch/train_tokenizers.py", *settings], cwd=ROOT, check=True)


class Study:
    """The runs of the study, and how far each has come."""

    def __init__(self, steps: int, seeds: Sequence[int], jobs: int, overrides: Sequence[str]):
        self.steps, self.seeds, self.jobs, self.overrides = steps, seeds, jobs, list(overrides)

    def folder(self, name: str, seed: int, stage: str = "") -> RunFolder:
        return RunFolder(RUNS / f"{name.replace(' ', '_')}_{seed}{stage}")

    def run(self) -> None:
        """Seed after seed, so that an unfinished study has whole comparisons."""
        with Progress() as progress, ThreadPoolExecutor(self.jobs) as pool:
            bar = progress.add_task("moma_eta", total=len(COLOURS) * len(self.seeds))
            todo = [(name, seed) for seed in self.seeds for name in COLOURS]
            for done in [pool.submit(self._one, name, seed, progress, bar) for name, seed in todo]:
                done.result()

    def _one(self, name: str, seed: int, progress: Progress, bar: TaskID) -> None:
        main = self.folder(name, seed)
        self._train(main, [*variant(name), f"train.steps={self.steps}", f"seed={seed}"])
        if name == "dense":
            self._evaluate(main)
        else:
            self._evaluate(self._train_causal_routers(name, seed, main))
        progress.console.print(f"{main.path.name}: done")
        progress.advance(bar)

    def _train_causal_routers(self, name: str, seed: int, main: RunFolder) -> RunFolder:
        causal = self.folder(name, seed, "_causal")
        init = f"init_from={{checkpoint: {main.path.relative_to(ROOT)}, new: ['*.auxiliary.*']}}"
        settings = [*variant(name, auxiliary=True), init, "trainable=['*.auxiliary.*']", f"seed={seed}"]
        settings += ["losses={causal_routers: {weight: 1.0}}", f"train.steps={CAUSAL_STEPS}"]
        self._train(causal, settings)
        return causal

    def _train(self, folder: RunFolder, settings: list[str]) -> None:
        recipe = ["launch/train.py", "--config", "configs/moma_quickstart.yaml", *self._ordered(settings)]
        self._python(folder, [*recipe, f"run.dir={folder.path.relative_to(ROOT)}"])

    def _ordered(self, settings: list[str]) -> list[str]:
        """A setting that replaces a section comes before those that set a key in it."""
        own = {setting.partition("=")[0] for setting in settings}
        base = [setting for setting in BASE if not any(setting.startswith(f"{key}.") for key in own)]
        return [*base, *settings, *self.overrides]

    def _evaluate(self, folder: RunFolder) -> None:
        if not (folder.path / "evaluation.json").exists():
            self._python(folder, ["launch/evaluate.py", str(folder.path), "eval.groups=64"])

    def _python(self, folder: RunFolder, command: list[str]) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        with (folder.path / "study.log").open("a") as log:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: see {log.name}")

    def curve(self, name: str, seed: int) -> dict[str, np.ndarray]:
        """FLOPs, tokens and losses of a run, smoothed."""
        lines = read_run(self.folder(name, seed).path).lines
        flops = np.cumsum([line["model_flops_per_second"] * line["step_seconds"] for line in lines])
        values = {"flops": flops, "tokens": [line["tokens"] for line in lines]}
        values |= {title: [line[key] for line in lines] for title, key in LOSSES.items()}
        return {key: smoothed(np.asarray(value, dtype=float), WINDOW) for key, value in values.items()}

    def evaluation(self, name: str, seed: int) -> Path:
        return self.folder(name, seed, "" if name == "dense" else "_causal").path / "evaluation.json"

    def done(self, name: str) -> list[int]:
        """Seeds with which the model is trained and evaluated, and the dense model beside it."""
        return [seed for seed in self.seeds if all(self.evaluation(of, seed).exists() for of in ("dense", name))]

    @property
    def names(self) -> list[str]:
        """Of the models that are done with one seed or more."""
        return [name for name in COLOURS if self.done(name)]

    def etas(self, name: str, title: str) -> np.ndarray:
        """[seed, point of the dense curve]"""
        found = []
        for seed in self.done(name):
            dense, sparse = self.curve("dense", seed), self.curve(name, seed)
            found.append(eta(dense["flops"], dense[title], sparse["flops"], sparse[title]))
        return np.stack(found)


def by_seed(values: Sequence[float]) -> str:
    """A run that does not come down to dense's last loss has spent all its FLOPs, which are dense's: eta is below 1."""
    return ", ".join("< 1" if np.isnan(value) else f"{value:.2f}" for value in values)


def eta_rows(study: Study) -> list[str]:
    rows = []
    for name in study.names[1:]:
        found = {title: study.etas(name, title) for title in LOSSES}
        quarters = [round(share * (found["overall"].shape[1] - 1)) for share in (0.25, 0.5, 0.75)]
        cells = [str(len(study.done(name))), *(f"{found['overall'][:, at].mean():.2f}" for at in quarters)]
        cells += [by_seed(found[title][:, -1]) for title in LOSSES]
        rows.append("| " + " | ".join([name, *cells]) + " |")
    return rows


def loss_rows(study: Study) -> list[str]:
    rows = []
    for name in study.names:
        curves = [study.curve(name, seed) for seed in study.done(name)]
        per_token = statistics.mean(curve["flops"][-1] / curve["tokens"][-1] for curve in curves)
        held_out = [json.loads(study.evaluation(name, seed).read_text()) for seed in study.done(name)]
        causal = "eval/loss" if name == "dense" else "eval/causal/loss"
        cells = [name, f"{per_token / 1e6:.2f}", *(f"{statistics.mean(c[t][-1] for c in curves):.3f}" for t in LOSSES)]
        for prefix in ("eval/loss", causal):
            keys = [prefix, *(f"{prefix}/{modality}" for modality in MODALITIES)]
            cells.append(" / ".join(f"{statistics.mean(found[key] for found in held_out):.3f}" for key in keys))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def picture(study: Study, path: Path) -> None:
    """Above the smoothed training losses, below eta over the length of training; bands: the seeds' range."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for column, title in enumerate(LOSSES):
        for name in study.names:
            colour = COLOURS[name]
            curves = [study.curve(name, seed) for seed in study.done(name)]
            tokens = curves[0]["tokens"] / 1e6
            values = {0: np.stack([curve[title] for curve in curves])}
            if name != "dense":
                values[1] = study.etas(name, title)
            for row, found in values.items():
                axes[row, column].plot(tokens, found.mean(0), color=colour, label=name)
                axes[row, column].fill_between(tokens, found.min(0), found.max(0), color=colour, alpha=0.2, lw=0)
        axes[0, column].set(title=f"training loss, {title}", ylabel="nats a token", yscale="log")
        axes[1, column].set(title=f"eta, {title}", xlabel="million tokens of the dense run", ylim=(0, None))
        axes[1, column].axhline(1, color="black", lw=0.8, ls=":")
    axes[0, 0].legend()
    figure.suptitle("Training losses of sparse models are non-causal (expert choice)")
    figure.savefig(path, dpi=110)


def write(study: Study) -> None:
    stem = ROOT / "benchmarks" / "results" / f"{date.today()}-moma_eta"
    picture(study, stem.with_suffix(".png"))
    every = max(1, study.steps // 100)
    curves = {
        f"{name}, seed {seed}": {
            key: [float(f"{value:.6g}") for value in values[::every]] for key, values in study.curve(name, seed).items()
        }
        for name in study.names
        for seed in study.done(name)
    }
    stem.with_suffix(".json").write_text(json.dumps(curves) + "\n")
    tokens = study.curve("dense", study.seeds[0])["tokens"][-1] / 1e6
    note = NOTE.format(steps=study.steps, tokens=tokens, window=WINDOW, causal=CAUSAL_STEPS)
    note = "\n".join([note, "", *table(LOSS_HEADER, loss_rows(study)), "", f"![curves]({stem.name}.png)"])
    write_result("moma_eta", "MoMa's efficiency in small", note, ETA_HEADER, eta_rows(study))


ETA_HEADER = "| model | seeds | eta after a quarter | a half | three quarters | at the end, by seed | text | image |"
LOSS_HEADER = (
    "| model | MFLOPs a token | training loss | text | image | held-out, routing of training: all / text / image | "
    "held-out, causal |"
)
NOTE = (
    "{steps} steps, {tokens:.1f} M tokens, each seed on the same data in the same order for all models, "
    "a constant learning rate after warm-up, so that every point of a curve compares equal conditions. Losses in nats "
    "per token, training losses means over {window} steps. eta: FLOPs of dense / FLOPs at which the model has come "
    "down to dense's loss; training losses of the sparse models are non-causal. Held-out with causal routers: after "
    "{causal} steps of their own stage. Speed is another benchmark's: benchmarks/throughput.py."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    study = Study(arguments.steps, arguments.seeds, arguments.jobs, arguments.overrides)
    if not arguments.write_only:
        prepare()
        study.run()
    write(study)


if __name__ == "__main__":
    main()
