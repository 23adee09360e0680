"""The page of the efficiency study on one GPU: tables and a picture, from the curves alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gpu.eta_job import LOSSES, read_curve
from moe_dist.evaluate.efficiency import eta, smoothed
from runs import table, write_result

TITLES = dict(zip(LOSSES, ("all", "text", "image"), strict=True))
KINDS = {"train": "training", "held_out": "held-out"}
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
COLOURS = ("#5b6770", "#c98a1b", "#8a5fa8", "#0b6fa4", "#d1495b")
ETA_HEADER = "| model | " + " | ".join(f"eta, {kind}, {title}" for kind in KINDS.values() for title in TITLES.values())
ETA_HEADER += " |"
LOSS_HEADER = (
    "| model | M parameters | MFLOPs a token | M tokens | training loss: all / text / image | "
    "held-out at the end | lowest held-out, at step | ms a step |"
)
GAIN_HEADER = (
    "| nats a token less than dense, after | "
    + " | ".join(f"training, {share:.0%}" for share in FRACTIONS)
    + " | "
    + " | ".join(f"held-out, {share:.0%}" for share in FRACTIONS)
    + " |"
)
NOTE = """\
{steps} steps of {batch} tokens, {tokens:.1f} M tokens a model, every model on the same batches in the same order,
through the engine in bf16: {layers} layers of width {width} (MoD: {deeper} layers), AdamW, peak learning rate
{rate:g}, linear warm-up over a twentieth of the steps, then linear decay to a hundredth. One seed. {sweep}All tokens
of a batch compete in expert choice. Up to {beside} processes shared the card, so do not compare the milliseconds
with other measurements.

The training split has {pictures} pictures and {text:.1f} M tokens of text. **Each picture is seen {seen_image}
times, each text {seen_text} times** (in the planned steps), so training losses contain what is memorised;
held-out losses do not ({held_out} predictions). All losses are in nats per token, **with the routing of training, which
is not causal for the sparse models** (expert choice). Training losses are means over {window} steps.

eta: FLOPs at which dense first reaches the lowest loss of its run, divided by the FLOPs at which the sparse model
first reaches that loss. In training, dense reaches it at the end of its decay, with all its FLOPs. A sparse model
that reaches it earlier still has a higher learning rate at that point; a run whose schedule ended there would
probably need fewer FLOPs, so a training eta above 1 is an underestimate. "< 1": the model does not reach that loss
with all its FLOPs. The third table compares the losses at equal fractions of the steps, where the learning rates are
equal.
"""


class Curves:
    """The curves of a folder; training losses are smoothed."""

    def __init__(self, folder: Path, names: Sequence[str]):
        found = {name: read_curve(folder / f"{name.replace(' ', '_')}.json") for name in names}
        self.of = {name: curve for name, curve in found.items() if curve and curve["held_out"]}
        if "dense" not in self.of:
            raise SystemExit(f"{folder}/dense.json has no held-out loss yet: run the job first")
        self.first = self.of["dense"]
        self.steps = self.first["settings"]["steps"]
        self.window = max(1, min(20, self.steps // 10))
        plan = folder / "plan.json"
        self.plan: dict[str, Any] = json.loads(plan.read_text()) if plan.exists() else {}

    def values(self, name: str, kind: str, key: str) -> np.ndarray:
        """Return losses, tokens or FLOPs of each point."""
        values = np.asarray(self.of[name][kind][key], dtype=float)
        return smoothed(values, self.window) if kind == "train" else values

    def eta(self, name: str, kind: str, key: str) -> float:
        """Return eta at the lowest loss of dense; nan if the model never reaches it."""
        both = [self.values(of, kind, column) for of in ("dense", name) for column in ("flops", key)]
        return float(eta(*both)[-1])

    def gain(self, name: str, kind: str, share: float) -> str:
        """Return dense's loss minus the model's, after a fraction of the planned steps."""
        total = self.steps if kind == "train" else self.first["settings"]["evaluations"]
        at = round(share * total) - 1 - (self.window - 1 if kind == "train" else 0)
        both = [self.values(of, kind, "loss") for of in ("dense", name)]
        return f"{both[0][at] - both[1][at]:+.3f}" if 0 <= at < min(map(len, both)) else ""


def eta_rows(curves: Curves) -> list[str]:
    rows = []
    for name in list(curves.of)[1:]:
        below = "< 1" if curves.of[name]["done"] and curves.first["done"] else "not reached"
        found = [curves.eta(name, kind, key) for kind in KINDS for key in LOSSES]
        rows.append("| " + " | ".join([name, *(below if np.isnan(v) else f"{v:.2f}" for v in found)]) + " |")
    return rows


def loss_rows(curves: Curves) -> list[str]:
    rows = []
    for name, curve in curves.of.items():
        train, held_out = curve["train"], curve["held_out"]
        best = int(np.argmin(held_out["loss"]))
        unfinished = "" if curve["done"] else f" (cut off at step {curve['reached']} of {curves.steps})"
        seconds, tokens = np.diff(train["seconds"]), train["tokens"][-1]
        cells = [
            name + unfinished,
            f"{curve['parameters'] / 1e6:.1f}",
            f"{train['flops'][-1] / tokens / 1e6:.1f}",
            f"{tokens / 1e6:.1f}",
            " / ".join(f"{curves.values(name, 'train', key)[-1]:.3f}" for key in LOSSES),
            " / ".join(f"{held_out[key][-1]:.3f}" for key in LOSSES),
            f"{held_out['loss'][best]:.3f}, {held_out['step'][best]:.0f}",
            f"{1e3 * np.median(seconds):.0f}" if len(seconds) else "",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def gain_rows(curves: Curves) -> list[str]:
    return [
        "| " + " | ".join([name, *(curves.gain(name, kind, share) for kind in KINDS for share in FRACTIONS)]) + " |"
        for name in list(curves.of)[1:]
    ]


def picture(curves: Curves, path: Path) -> None:
    """Draw training losses above and held-out losses below, over FLOPs."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for row, kind in enumerate(KINDS):
        for column, (key, title) in enumerate(TITLES.items()):
            for name, colour in zip(curves.of, COLOURS, strict=False):
                flops = curves.values(name, kind, "flops") / 1e15
                axes[row, column].plot(flops, curves.values(name, kind, key), color=colour, label=name)
            lowest = curves.values("dense", kind, key).min()
            axes[row, column].axhline(lowest, color=COLOURS[0], lw=0.8, ls=":")
            axes[row, column].set(title=f"{KINDS[kind]} loss, {title}", yscale="log")
            for formatter in (axes[row, column].yaxis.set_major_formatter, axes[row, column].yaxis.set_minor_formatter):
                formatter("{x:g}")
        axes[row, 0].set(ylabel="nats a token")
    for column in range(3):
        axes[1, column].set(xlabel="PFLOPs of training")
    axes[0, 0].legend()
    figure.suptitle("Losses of the sparse models are non-causal (expert choice); dotted: the lowest of dense")
    figure.savefig(path, dpi=110)


def swept(plan: dict[str, Any]) -> str:
    """Return a sentence about the learning-rate sweep."""
    if not plan.get("sweep"):
        return ""
    each = "; ".join(
        f"{rate}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in found.items())
        for rate, found in plan["sweep"].items()
    )
    return f"The rate is the best common one of a sweep (training losses at step {plan['sweep_step']}: {each}). "


def note(curves: Curves) -> str:
    first, model = curves.first, curves.first["model"]
    deeper = curves.of.get("MoD 4t4i", first)["model"]["num_layers"]
    return NOTE.format(
        steps=curves.steps,
        batch=first["batch_tokens"],
        tokens=curves.steps * first["batch_tokens"] / 1e6,
        layers=model["num_layers"],
        width=model["hidden_size"],
        deeper=deeper,
        rate=first["settings"]["rate"],
        sweep=swept(curves.plan),
        pictures=first["facts"]["pictures"],
        text=first["facts"]["text_tokens"] / 1e6,
        seen_image=first["times_seen"]["image"],
        seen_text=first["times_seen"]["text"],
        held_out=first["held_out_tokens"],
        window=curves.window,
        beside=first["beside"],
    )


def write_page(folder: Path, names: Sequence[str], results: Path) -> None:
    """Write <date>-moma_eta_gpu.md, .json and .png into `results`."""
    curves, first = Curves(folder, names), read_curve(folder / "dense.json")
    stem = results / f"{first['date']}-moma_eta_gpu"
    picture(curves, stem.with_suffix(".png"))
    content = {"plan": curves.plan, "curves": {name: thinned(curve) for name, curve in curves.of.items()}}
    stem.with_suffix(".json").write_text(json.dumps(content) + "\n")
    losses, gains = table(LOSS_HEADER, loss_rows(curves)), table(GAIN_HEADER, gain_rows(curves))
    text = "\n".join([note(curves), *losses, "", *gains, "", f"![curves]({stem.name}.png)"])
    ran = f"{first['machine']}. `{first['command']}`"
    write_result(
        "moma_eta_gpu",
        "MoMa's efficiency on one GPU",
        text,
        ETA_HEADER,
        eta_rows(curves),
        ran=ran,
        day=first["date"],
        folder=results,
    )


def thinned(curve: dict[str, Any]) -> dict[str, Any]:
    """Keep about a hundred points of each training curve."""
    every = max(1, len(curve["train"]["loss"]) // 100)
    return curve | {"train": {key: values[::every] for key, values in curve["train"].items()}}
