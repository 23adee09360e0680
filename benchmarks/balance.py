"""Measure whether the ranks have equal work if expert counts do not divide evenly. python benchmarks/balance.py [STEPS]

Trains 7t1i and 6t2i with mixture-of-depths for STEPS steps (default 20) on two ranks (EP=2), with the emoji and a text
corpus (after `make data` and `python launch/prepare_data.py corpus=text out=data/text`), at data mixes from 90:10 to
10:90. Records the work that each selection group gives attention and experts. From that it computes the work of the
ranks at EP=2 (as run), 4 and 8, with and without slices. Resumable: a recorded case is not trained again. Writes
benchmarks/results/<date>-balance.md and .png.

Shape suffixes: S steps, L layers, G selection groups of a step, E experts; B micro-batches of all ranks, R ranks.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_dist.config.recipe import load_config
from moe_dist.core.batch import IMAGE, Batch
from moe_dist.core.costs import Work, num_weights
from moe_dist.core.step import ModelOutput
from moe_dist.metrics.flops import model_flops
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.model.moe.moe_layer import MoELayer
from moe_dist.model.moe.placement import Placement, make_placement
from moe_dist.parallel.agreement import gather_objects
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.training.deepspeed import init_distributed
from moe_dist.training.engine import StepResult
from moe_dist.training.run import Run
from runs import ROOT, moma, table, write_result

RECIPE = ROOT / "configs" / "mod_moma_quickstart.yaml"
FOLDER = ROOT / "runs" / "benchmark" / "balance"
EXPERTS = {"7t1i": (7, 1), "6t2i": (6, 2)}
MIXES = (90, 70, 50, 30, 10)  # per cent of text
RANKS = (2, 4, 8)
WORLD, STEPS, GOAL = 2, 20, 0.05


@dataclass(frozen=True)
class Case:
    experts: str
    text: int
    scope: str

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.experts}_{self.text}_{self.scope}.npz"

    def slices(self, ranks: int) -> int:
        """Return the smallest number of slices that gives every rank the same number of each modality."""
        return ranks // math.gcd(ranks, *EXPERTS[self.experts])

    def placement(self, ranks: int, sliced: bool) -> Placement:
        text, image = EXPERTS[self.experts]
        return make_placement([range(text), range(text, text + image)], ranks, self.slices(ranks) if sliced else 1)

    def overrides(self) -> list[str]:
        return [
            f"run.dir={FOLDER}",
            "run.resume=none",
            f"parallel.expert={WORLD}",
            "data.shards=[data/emoji, data/text]",
            # Images without their captions, ten to a sequence, or their 64 codes could not make up 90 % of the tokens.
            f"data.image_fraction={(100 - self.text) / 100}",
            "data.caption_dropout=1.0",
            "data.sequence_length=680",
            "schedule.warmup_steps=8",
            f"model.depth.scope={self.scope}",
            f"model.ffn.slices={self.slices(WORLD)}",
            f"model.ffn.router={moma(*EXPERTS[self.experts])}",
        ]


CASES = [Case(*case, "modality") for case in product(EXPERTS, MIXES)]
CASES += [Case("7t1i", text, "group") for text in MIXES]  # the paper's scope, for comparison


# --- recording, on the ranks


def record(case: Case, layout: Layout, steps: int) -> None:
    """Train, and write the work of every step's groups. Collective."""
    run = Run.build(load_config(RECIPE, case.overrides()), layout, RunFolder(FOLDER))
    counted: list[dict[str, np.ndarray]] = []
    rows: list[int] = []  # rows that the experts of this rank really received, layer after layer
    for layer in run.engine.module.modules():
        if isinstance(layer, MoELayer):
            layer.experts.register_forward_pre_hook(lambda _, inputs: rows.append(sum(inputs[1])))  # type: ignore
    outputs: list[ModelOutput] = []
    run.engine.module.register_forward_hook(lambda *of_forward: outputs.append(of_forward[-1]))
    train_step = run.engine.train_step

    def watched(micro_batches: Any, *arguments: Any) -> StepResult:
        batches = list(micro_batches)
        rows.clear()
        result = train_step(batches, *arguments)
        counted.append(count(batches[-1], outputs[-1]))
        check(run, batches[-1], outputs[-1], counted[-1], rows)
        outputs.clear()
        return result

    run.engine.train_step = watched  # type: ignore[method-assign]
    losses = [run.train_step()["loss"] for _ in range(steps)]
    mine = {key: np.stack([step[key] for step in counted]) for key in counted[0]}
    everyones = gather_objects(mine)
    if layout.is_main:
        FOLDER.mkdir(parents=True, exist_ok=True)
        # [S, L, G]; group j of a step is number j // ranks of rank j mod ranks.
        united = {key: np.stack([of[key] for of in everyones], axis=3) for key in mine}
        flat = {key: x.reshape(*x.shape[:2], -1, *x.shape[4:]) for key, x in united.items()}
        np.savez(case.path, losses=losses, **flat)
        print(f"{case}: loss {losses[0]:.2f} -> {losses[-1]:.2f}", flush=True)


def count(batch: Batch, output: ModelOutput) -> dict[str, np.ndarray]:
    """Count the work of this rank's groups, [L, G]: tokens and (query, key) pairs of attention, valid and image tokens
    that the layer processes, and rows of each expert [L, G, E].
    """
    info, depths = batch.info, {depth.layer: depth for depth in output.depths}
    size = info.num_tokens // info.num_groups
    group_N = np.array([0, *accumulate(info.document_lengths)][:-1]) // size
    layers: dict[str, list] = {"tokens": [], "pairs": [], "valid": [], "image": [], "rows": []}
    for record in output.records:
        lengths_N = np.array(depths[record.layer].document_lengths if record.layer in depths else info.document_lengths)
        layers["tokens"].append(np.bincount(group_N, lengths_N, info.num_groups))
        layers["pairs"].append(np.bincount(group_N, lengths_N * (lengths_N + 1) / 2, info.num_groups))
        seen = [part.token_V.numpy() // size for part in record.routings]
        layers["image"].append(np.bincount(seen[IMAGE], minlength=info.num_groups))
        layers["valid"].append(sum(np.bincount(groups, minlength=info.num_groups) for groups in seen))
        kept = [part.kept_VE.numpy() for part in record.routings]
        layers["rows"].append(
            [
                [n for kept_VE, at in zip(kept, seen, strict=True) for n in kept_VE[at == g].sum(0)]
                for g in range(info.num_groups)
            ]
        )
    return {key: np.array(values).astype(np.int64) for key, values in layers.items()}


def check(run: Run, batch: Batch, output: ModelOutput, counted: dict[str, np.ndarray], rows: list[int]) -> None:
    """Assert that the counts give the FLOPs of metrics/flops.py and the rows that the experts really received."""
    admitted = {depth.layer: depth.document_lengths for depth in output.depths}
    rows_LE = counted["rows"].sum(1)
    rows_L = [int(rows) for rows in rows_LE.sum(1)]
    work = Work(document_lengths=batch.info.document_lengths, admitted=admitted, rows=dict(enumerate(rows_L)))
    expected = model_flops(run.model, work) - 6 * num_weights(run.model.output) * work.tokens
    attention_LG, expert = flops(counted["tokens"], counted["pairs"])
    assert attention_LG.sum() + expert * rows_LE.sum() == expected
    everyones_LE = sum(gather_objects(rows_LE))
    held = next(m for m in run.engine.module.modules() if isinstance(m, MoELayer)).experts.expert_ids
    assert everyones_LE[:, [number % rows_LE.shape[1] for number in held]].sum(1).tolist() == rows


def flops(tokens: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, int]:
    """Return forward and backward FLOPs, as in metrics/flops.py: of attention with its projections, and of one row of
    an expert.
    """
    model = load_config(RECIPE).model
    width = model.hidden_size
    return 6 * (4 * width * width * tokens + 2 * width * pairs), 6 * 3 * width * model.ffn.hidden_size


# --- computing the work of ranks


@dataclass(frozen=True)
class Ranks:
    """The work of a number of ranks, computed from a recorded case. Each rank has a number of
    groups in a micro-batch.
    """

    attention_BRL: np.ndarray
    expert_BRL: np.ndarray
    network: float  # rows sent to another rank, per token that a layer processes

    def imbalance(self, part: str = "both") -> np.ndarray:
        """[B]: the fraction lost because ranks wait for the slowest at each dispatch and each combine. It is the sum
        over the layers of the largest attention plus the largest experts' work, divided by the sum of the means, minus
        1.
        """
        parts = {"attention": (self.attention_BRL,), "experts": (self.expert_BRL,)}
        chosen = parts.get(part, (self.attention_BRL, self.expert_BRL))
        return sum(x.max(1).sum(1) for x in chosen) / sum(x.mean(1).sum(1) for x in chosen) - 1

    def spread(self) -> np.ndarray:
        """[B]: the largest work of a rank in the whole step divided by the smallest, minus 1."""
        work_BR = (self.attention_BRL + self.expert_BRL).sum(2)
        return work_BR.max(1) / work_BR.min(1) - 1


def work_out(case: Case, ranks: int, each: int, *, sliced: bool) -> Ranks:
    """Compute the work with `each` groups per rank, dealt in turn as the loader does. If one step has too few groups,
    join several.
    """
    recorded = np.load(case.path)
    attention_SLG, expert = flops(recorded["tokens"], recorded["pairs"])
    attention_NL, valid_NL = (np.moveaxis(x, 1, 2).reshape(-1, x.shape[1]) for x in (attention_SLG, recorded["valid"]))
    rows_NLE = np.moveaxis(recorded["rows"], 1, 2).reshape(*attention_NL.shape, -1)
    batches = len(attention_NL) // (ranks * each)
    dealt_BnR = np.arange(batches * ranks * each).reshape(batches, each, ranks)
    rows_BRLE = rows_NLE[dealt_BnR].sum(1)
    placement = case.placement(ranks, sliced)
    held_RE = np.zeros((ranks, rows_BRLE.shape[-1]))
    for rank, held in enumerate(placement.local_experts):
        np.add.at(held_RE[rank], [number % held_RE.shape[1] for number in held], 1)
    arriving_BRL = np.einsum("bsle,re->brl", rows_BRLE, held_RE)
    own_BRL = np.einsum("brle,re->brl", rows_BRLE, held_RE)
    network = (arriving_BRL.sum() - own_BRL.sum()) / valid_NL[dealt_BnR].sum()
    return Ranks(attention_NL[dealt_BnR].sum(1), arriving_BRL * expert / placement.slices, float(network))


HEADER = (
    "| experts | text:image | EP | slices | whole: experts | whole: both | slices: experts | attention | both | "
    "worst step: both | largest over smallest | 4 groups a rank: both | largest over smallest | sent, whole | slices |"
)
NOTE = (
    "The model has 7 layers; every other one admits a quarter of the tokens (model.depth.scope=modality: each "
    "modality at its share). It trains {steps} steps of 8 selection groups of 1,360 tokens on two ranks, EP=2. In "
    "every step the experts of both ranks received the rows that the record predicts, and the FLOPs are those that it "
    "predicts. EP=4 and 8, and whole experts, are computed from the recorded routing, with the 8 groups of a step "
    "dealt to the ranks (4, 2, 1 groups per rank). Experts, attention and both: what a step loses to waiting, in per "
    "cent, as the mean over the steps. Ranks meet at each layer's dispatch and combine. So the loss is the sum over "
    "the layers of the largest attention (with projections) plus the largest experts' work of a rank, divided by the "
    "sum of the means, minus 1. Largest over smallest: a rank's whole work in a step, minus 1, of the worst step. 4 "
    "groups a rank: the worst micro-batch with four groups on every rank. Sent: rows sent to another rank, per token "
    "that a layer processes. Images among the tokens, in per cent: {shares}."
)


def row(case: Case, ranks: int) -> str:
    whole, sliced = (work_out(case, ranks, 8 // ranks, sliced=way) for way in (False, True))
    four = work_out(case, ranks, 4, sliced=True)
    numbers = [whole.imbalance(part).mean() for part in ("experts", "both")]
    numbers += [sliced.imbalance(part).mean() for part in ("experts", "attention", "both")]
    numbers += [worst for way in (sliced, four) for worst in (way.imbalance().max(), way.spread().max())]
    cells = [case.experts, f"{case.text}:{100 - case.text}", str(ranks), str(case.slices(ranks))]
    cells += [*(f"{100 * number:.1f}" for number in numbers), f"{whole.network:.2f}", f"{sliced.network:.2f}"]
    return "| " + " | ".join(cells) + " |"


def shares(case: Case) -> np.ndarray:
    """[S, L, G]: fraction of images among the tokens that a layer processes."""
    recorded = np.load(case.path)
    return recorded["image"] / recorded["valid"]


def scope_rows() -> list[str]:
    """Compare mixture-of-depths with scope=modality and with the paper's scope=group."""
    header = (
        "| 7t1i, text:image | images in the data | admitted, scope=modality: least to most of a layer | scope=group | "
        "EP=8 with slices, both: scope=modality | scope=group |"
    )
    rows = []
    for text in MIXES:
        ways = [Case("7t1i", text, scope) for scope in ("modality", "group")]
        cells = [f"{text}:{100 - text}", f"{100 * shares(ways[0])[:, 1].mean():.1f}"]
        for case in ways:
            of_layers = 100 * shares(case)[:, ::2].mean(axis=(0, 2))
            cells.append(f"{of_layers.min():.1f} to {of_layers.max():.1f}")
        cells += [f"{100 * work_out(case, 8, 1, sliced=True).imbalance().mean():.1f}" for case in ways]
        rows.append("| " + " | ".join(cells) + " |")
    return table(header, rows)


def draw(path: Path) -> None:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, experts in zip(figure.subplots(1, 2, sharey=True), EXPERTS, strict=True):
        for ranks, colour in zip(RANKS, ("#0b6fa4", "#d1495b", "#3d8b5f"), strict=True):
            for sliced, style in ((False, ":"), (True, "-")):
                found = [work_out(Case(experts, text, "modality"), ranks, 4, sliced=sliced) for text in MIXES]
                label = f"EP={ranks}, {'slices' if sliced else 'whole experts'}"
                axes.plot(MIXES, [100 * of.imbalance().mean() for of in found], style, color=colour, label=label)
        axes.axhline(100 * GOAL, color="#5b6770", linewidth=0.8)
        axes.set(title=experts, xlabel="text tokens, %", yscale="symlog")
    figure.axes[0].set(ylabel="lost to waiting, %, 4 groups a rank")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def report(steps: int) -> None:
    ours = [case for case in CASES if case.scope == "modality"]
    found = ", ".join(
        f"{case.experts} {case.text}:{100 - case.text} {100 * shares(case)[:, 1].mean():.1f}" for case in ours
    )
    rows = [row(case, ranks) for case in ours for ranks in RANKS]
    name = f"{date.today()}-balance.png"
    draw(ROOT / "benchmarks" / "results" / name)
    extra = ["", "Which tokens the layers with mixture-of-depths admit, images in per cent:", "", *scope_rows(), ""]
    note = NOTE.format(steps=steps, shares=found)
    write_result("balance", "Balance of the ranks", note, HEADER, [*rows, *extra, f"![balance]({name})"])


def main(steps: int) -> None:
    if "RANK" in os.environ:
        layout = make_layout(expert=WORLD, device=init_distributed())
        for number, case in enumerate(CASES):
            if not any(gather_objects(case.path.exists())):
                if layout.is_main:
                    print(f"case {number + 1} of {len(CASES)}", flush=True)
                record(case, layout, steps)
        return
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    subprocess.run([sys.executable, *ranks, *sys.argv], cwd=ROOT, check=True)
    report(steps)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
