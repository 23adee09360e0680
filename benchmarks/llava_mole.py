"""Does a mixture of LoRA experts beat plain LoRA of the same size on two domains? python benchmarks/llava_mole.py

Trains the LLaVA-MoLE quickstart and its control (after `make data CONFIG=configs/llava_mole_quickstart.yaml`),
evaluates both and writes benchmarks/results/<date>-llava_mole.md. Resumable.
"""

from runs import flops, seconds, train_and_evaluate, write_result

RECIPES = ("llava_mole_quickstart", "llava_lora_quickstart")
NOTE = "Held-out loss on answers, in nats per token (causal); shuffled: prompts and answers against other pictures."
HEADER = "| recipe | train s | training TFLOPs | first -> last | held-out | emoji | clip art | shuffled | bigram |"


def run(recipe: str) -> str:
    """Train one recipe and return its row of the table."""
    lines, results, _ = train_and_evaluate(recipe)
    losses = f"{lines[0]['loss']:.2f} -> {lines[-1]['loss']:.2f}"
    cells = [recipe, f"{seconds(lines):.0f}", f"{flops(lines) / 1e12:.1f}", losses]
    keys = ("loss", "loss/domain/emoji", "loss/domain/clipart", "shuffled/loss", "bigram/text")
    return "| " + " | ".join([*cells, *(f"{results[f'eval/{key}']:.3f}" for key in keys)]) + " |"


if __name__ == "__main__":
    write_result("llava_mole", "LLaVA-MoLE against plain LoRA", NOTE, HEADER, [run(recipe) for recipe in RECIPES])
