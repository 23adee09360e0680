"""Measure how much arithmetic MoMa's sparse models save against dense at the same training loss, at small scale.

  python benchmarks/moma_eta.py [--steps 1280] [--seeds 0 1] [--jobs 2] [--write-only] [section.key=value ...]

Trains dense, moe_8x, MoMa 1t1i and 4t4i, and mixture-of-depths + 4t4i, at equal active FLOPs per token, on emoji, clip
art and texts. For each seed all models see the same data in the same order. Then it trains the auxiliary routers of
each sparse model, for the held-out loss with causal routing. Builds its data on first use.

Resumable: a run continues from its checkpoint, also with more --steps, and finished runs are not repeated. --jobs is
the number of runs that train at the same time, one thread each. --write-only trains nothing and writes the results so
far: tables, picture and curves in benchmarks/results/<date>-moma_eta.md, .png and .json. The learning rate comes from
benchmarks/moma_eta_rates.py.

--gpu and --prepare-gpu call benchmarks/moma_eta_gpu.py: the study on one GPU, at width 256.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import moma_eta_gpu
from moe_dist.core.batch import MODALITIES
from moma_study import CAUSAL_STEPS, LOSSES, NAMES, WINDOW, Study, prepare
from runs import ROOT, table, write_result

COLOURS = dict(zip(NAMES, ("#5b6770", "#c98a1b", "#8a5fa8", "#0b6fa4", "#d1495b"), strict=True))


def at_the_end(eta_W: np.ndarray, last: int) -> str:
    """Return the median of the last points. A run that does not reach dense's loss (nan) has spent all its FLOPs, which
    equal dense's, so its eta is below 1.
    """
    median = np.median(np.nan_to_num(eta_W[-last:]))
    return f"{median:.2f}" if median else "< 1"


def eta_rows(study: Study) -> list[str]:
    """Return the rows of the eta table: by seed, except that the columns over the length of training are means."""
    rows = []
    for name in study.names[1:]:
        found = {title: study.etas(name, title) for title in LOSSES}
        at = [round(share * study.steps) - WINDOW for share in (0.25, 0.5, 0.75)]
        cells = [f"{value:.2f}" for value in found["overall"][:, at].mean(0)]
        cells += [", ".join(at_the_end(eta_W, study.last) for eta_W in found[title]) for title in LOSSES]
        rows.append("| " + " | ".join([name, *cells]) + " |")
    return rows


def gain_rows(study: Study) -> list[str]:
    rows = []
    for name in study.names[1:]:
        seeds = [(study.lines("dense", seed), study.lines(name, seed)) for seed in study.done(name)]
        ends = [list(zip(dense, sparse, strict=True))[-study.last :] for dense, sparse in seeds]
        cells = []
        for key in LOSSES.values():
            gains = [statistics.mean(dense[key] - sparse[key] for dense, sparse in end) for end in ends]
            cells.append(", ".join(f"{gain:+.3f}" for gain in gains))
        rows.append("| " + " | ".join([name, *cells]) + " |")
    return rows


def loss_rows(study: Study) -> list[str]:
    rows = []
    for name in study.names:
        curves = [study.curve(name, seed) for seed in study.done(name)]
        per_token = statistics.mean(curve["flops"][-1] / curve["tokens"][-1] for curve in curves)
        held_out = [study.evaluation(name, seed) for seed in study.done(name)]
        causal = "eval/loss" if name == "dense" else "eval/causal/loss"
        cells = [name, f"{per_token / 1e6:.2f}", *(f"{statistics.mean(c[t][-1] for c in curves):.3f}" for t in LOSSES)]
        for prefix in ("eval/loss", causal):
            keys = [prefix, *(f"{prefix}/{modality}" for modality in MODALITIES)]
            cells.append(" / ".join(f"{statistics.mean(found[key] for found in held_out):.3f}" for key in keys))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def picture(study: Study, path: Path) -> None:
    """Draw the smoothed training losses above, and eta over the length of training below. Bands show the range of the
    seeds.
    """
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
        for formatter in (axes[0, column].yaxis.set_major_formatter, axes[0, column].yaxis.set_minor_formatter):
            formatter("{x:g}")
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
    tokens = study.lines("dense", study.seeds[0])[-1]["tokens"] / 1e6
    note = NOTE.format(steps=study.steps, tokens=tokens, window=WINDOW, causal=CAUSAL_STEPS, last=study.last)
    losses, gains = table(LOSS_HEADER, loss_rows(study)), table(GAIN_HEADER, gain_rows(study))
    note = "\n".join([note, "", *losses, "", *gains, "", f"![curves]({stem.name}.png)"])
    write_result("moma_eta", "MoMa's efficiency at small scale", note, ETA_HEADER, eta_rows(study))


ETA_HEADER = "| model | eta after a quarter | a half | three quarters | at the end, by seed | text | image |"
GAIN_HEADER = "| nats a token less than dense, by seed | overall | text | image |"
LOSS_HEADER = (
    "| model | MFLOPs a token | training loss | text | image | held-out, routing of training: all / text / image | "
    "held-out, causal |"
)
NOTE = (
    "{steps} steps, {tokens:.1f} M tokens. For each seed all models see the same data in the same order. The learning "
    "rate is constant after warm-up, so that every point of a curve compares equal conditions. Losses are in nats per "
    "token; training losses (non-causal for the sparse models) are means over {window} steps. Second table: "
    "difference of the training losses on the same batches, over the last {last} steps. eta: FLOPs of dense divided "
    "by the FLOPs at which the model reaches dense's loss; at the end: its median over the last {last} steps. "
    "Held-out with causal routers: after {causal} steps of their own stage. benchmarks/throughput.py measures speed."
)


def main() -> None:
    if {"--gpu", "--prepare-gpu"} & set(sys.argv[1:]):
        return moma_eta_gpu.main()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1280)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    study = Study(arguments.steps, arguments.seeds, arguments.overrides)
    if not arguments.write_only:
        prepare()
        study.run(arguments.jobs)
    write(study)


if __name__ == "__main__":
    main()
