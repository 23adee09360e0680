"""Does the quickstart learn, how fast, in how much memory? python benchmarks/quickstart.py [recipe ...]

Trains each recipe from the start (after `make data`), evaluates it beside its references, and writes
benchmarks/results/<date>-quickstart.md. Resumable: a recipe whose run is done is only evaluated again.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

from moe_dist.batch import MODALITIES
from moe_dist.telemetry.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
MARGIN = 0.3  # nats by which MoMa's held-out loss must beat the bigram model's, in each modality
RECIPES = ("moma_quickstart", "moe_8x_quickstart", "dense_quickstart")
HEADER = "| recipe | train s | tokens/s (median) | peak GiB a rank | " + " | ".join(
    f"{m} first -> last | {m} held-out | shuffled | bigram" for m in MODALITIES
)


def run(recipe: str) -> str:
    """One row of the table."""
    folder = RunFolder(ROOT / "runs" / "benchmark" / recipe)
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "launch/train.py"]
    # A resumed benchmark does not know the ranks' memory any more.
    peak = peak_gib([*launcher, "--config", f"configs/{recipe}.yaml", f"run.dir={folder.path}"])
    subprocess.run([sys.executable, "launch/evaluate.py", str(folder.path), "eval.groups=64"], cwd=ROOT, check=True)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    results = json.loads((folder.path / "evaluation.json").read_text())
    speed = statistics.median(line["tokens_per_second"] for line in lines)
    cells = [recipe, f"{sum(line['step_seconds'] for line in lines):.0f}", f"{speed:,.0f}", f"{peak:.2f}"]
    for m in MODALITIES:
        cells.append(f"{lines[0][f'loss/{m}']:.2f} -> {lines[-1][f'loss/{m}']:.2f}")
        cells += [f"{results[f'eval/{kind}/{m}']:.3f}" for kind in ("loss", "shuffled/loss", "bigram")]
        if recipe.startswith("moma"):
            own, shuffled, bigram = (results[f"eval/{kind}/{m}"] for kind in ("loss", "shuffled/loss", "bigram"))
            assert own < bigram - MARGIN and own < shuffled, f"{recipe} has not learnt {m}: {results}"
    return "| " + " | ".join(cells) + " |"


def peak_gib(command: list[str]) -> float:
    """Run a command; the resident memory of the largest process it started: a rank."""
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_maxrss / 2**20


def main() -> None:
    rows = [run(recipe) for recipe in sys.argv[1:] or RECIPES]
    columns = HEADER.count("|")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}, no GPU"
    out = ROOT / "benchmarks" / "results" / f"{date.today()}-quickstart.md"
    out.write_text(
        f"# Quickstarts, {date.today()}\n\n{machine}. `python benchmarks/quickstart.py {' '.join(sys.argv[1:])}`\n\n"
        "Losses in nats per token; those of moma and moe_8x are non-causal (expert choice looks at later tokens).\n\n"
        + "\n".join([HEADER + " |", "|" + "---|" * columns, *rows])
        + "\n"
    )
    print(out.read_text())


if __name__ == "__main__":
    main()
