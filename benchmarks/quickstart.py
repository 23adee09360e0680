"""Measure whether the quickstart learns, how fast, and in how much memory. python benchmarks/quickstart.py [recipe ...]

Trains each recipe (after `make data`), evaluates it together with its baselines, and writes
benchmarks/results/<date>-quickstart.md. Resumable: a finished recipe is only evaluated again.
"""

import sys

from moe_dist.core.batch import MODALITIES
from runs import seconds, tokens_per_second, train_and_evaluate, write_result

MARGIN = 0.3  # nats by which MoMa's held-out loss must beat the bigram model's, in each modality
RECIPES = ("moma_quickstart", "moe_8x_quickstart", "dense_quickstart")
NOTE = "Losses in nats per token; those of moma and moe_8x are non-causal (expert choice looks at later tokens)."
BY_MODALITY = " | ".join(f"{m} first -> last | {m} held-out | shuffled | bigram" for m in MODALITIES)
HEADER = f"| recipe | train s | tokens/s (median) | peak GiB a rank | {BY_MODALITY} |"


def run(recipe: str) -> str:
    """Train one recipe and return its row of the table."""
    lines, results, peak = train_and_evaluate(recipe)
    cells = [recipe, f"{seconds(lines):.0f}", f"{tokens_per_second(lines):,.0f}", f"{peak:.2f}"]
    for m in MODALITIES:
        own, shuffled, bigram = (results[f"eval/{kind}/{m}"] for kind in ("loss", "shuffled/loss", "bigram"))
        cells.append(f"{lines[0][f'loss/{m}']:.2f} -> {lines[-1][f'loss/{m}']:.2f}")
        cells += [f"{value:.3f}" for value in (own, shuffled, bigram)]
        if recipe.startswith("moma"):
            assert own < bigram - MARGIN, f"{recipe} has not learnt {m}: {results}"
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    write_result("quickstart", "Quickstarts", NOTE, HEADER, [run(recipe) for recipe in sys.argv[1:] or RECIPES])
