"""Count router decisions so close that rounding could reverse them. python benchmarks/near_ties.py [STEPS]

Trains each recipe for STEPS steps (default 24) in one process with its own settings (after `make data`). Counts the
decisions (whether an expert or a null expert takes a token) by their margin: how far one logit must move to reverse
them (moe_dist/model/moe/margins.py). Rounding moves a logit by about 1e-7 in a forward pass. Writes
benchmarks/results/<date>-near_ties.md.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

from moe_dist.config.recipe import load_config
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.model.moe.margins import watch_decisions
from moe_dist.parallel.layout import make_layout
from moe_dist.training.deepspeed import init_distributed
from moe_dist.training.run import Run
from runs import ROOT, write_result

EMOJI_TEXT = ["data.shards=data/emoji", "data.text_tokenizer=data/tokenizers/text.model", "data.image_tokenizer=null"]
RECIPES: dict[str, list[str]] = {  # and overrides: AdaMoE's on the captions of the same corpus
    "moma_quickstart": [],
    "moe_8x_quickstart": [],
    "adamoe_quickstart": EMOJI_TEXT,
}
MARGINS = (1e-4, 1e-5, 1e-6, 1e-7)
STEPS = 24


def count(recipe: str, overrides: list[str], steps: int) -> tuple[int, list[int], list[float]]:
    """Return the number of decisions of all steps, the numbers below each margin, and the
    smallest margin of each step.
    """
    folder = ROOT / "runs" / "benchmark" / "near_ties" / recipe
    own = [f"run.dir={folder}", "run.resume=none", "parallel.expert=1", "telemetry.tensorboard=false"]
    config = load_config(ROOT / "configs" / f"{recipe}.yaml", [*overrides, *own])
    layout = make_layout(expert=1, device=init_distributed())
    run = Run.build(config, layout, RunFolder(Path(config.run.dir)))
    total, below, least = 0, [0] * len(MARGINS), []
    for _ in range(steps):
        with watch_decisions(run.engine.module) as found:
            run.train_step()
        margin_N = torch.cat([decisions.margin_VC.flatten() for decisions in found])
        total += len(margin_N)
        below = [number + int((margin_N < margin).sum()) for number, margin in zip(below, MARGINS, strict=True)]
        least.append(float(margin_N.min()))
    return total, below, least


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    rows = []
    for recipe, overrides in RECIPES.items():
        total, below, least = count(recipe, overrides, steps)
        shares = [f"{1e6 * number / total:.3g}" for number in below]
        cells = [recipe, f"{total:,}", *shares, f"{min(least):.0e}", f"{statistics.median(least):.0e}"]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    thresholds = " | ".join(f"below {margin:.0e}" for margin in MARGINS)
    header = f"| recipe | decisions | {thresholds} | least of all | least of a step, median |"
    note = (
        f"The first {steps} steps of each recipe on the emoji corpus (adamoe: its captions alone), one process, one "
        "seed. Columns: decisions per million with a margin below a threshold, the smallest margin of all decisions, "
        "and the median over the steps of a step's smallest margin."
    )
    write_result("near_ties", "Near-ties of the routers", note, header, rows)


if __name__ == "__main__":
    main()
