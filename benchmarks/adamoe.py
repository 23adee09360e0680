"""Do null experts beat top-2 at equal training FLOPs? python benchmarks/adamoe.py

Trains the AdaMoE quickstart and its control (after `make data CONFIG=configs/adamoe_quickstart.yaml`), evaluates both
and writes benchmarks/results/<date>-adamoe.md. Resumable.
"""

import statistics

from runs import flops, seconds, tokens_per_second, train_and_evaluate, write_result

RECIPES = ("adamoe_quickstart", "adamoe_top2_quickstart")
NOTE = "Held-out loss in nats per token (causal). True experts per token: mean over the last 50 steps."
HEADER = "| recipe | train s | tokens/s (median) | training TFLOPs | tokens | true experts/token | held-out | bigram |"


def run(recipe: str) -> str:
    """Train one recipe and return its row of the table."""
    lines, results, _ = train_and_evaluate(recipe)
    experts = statistics.mean(line["moe/experts_per_token"] for line in lines[-50:])
    cells = [
        recipe,
        f"{seconds(lines):.0f}",
        f"{tokens_per_second(lines):,.0f}",
        f"{flops(lines) / 1e12:.1f}",
        f"{lines[-1]['tokens']:,}",
        f"{experts:.2f}",
        f"{results['eval/loss/text']:.3f}",
        f"{results['eval/bigram/text']:.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    write_result("adamoe", "AdaMoE against top-2 at equal FLOPs", NOTE, HEADER, [run(recipe) for recipe in RECIPES])
