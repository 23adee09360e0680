"""Measure how far the loss jumps when experts are upcycled under expert choice, and how many steps it takes to recover.

  python benchmarks/upcycle.py [STEPS] [section.key=value ...]

Trains a 1t1i MoMa for STEPS steps (default 320). Upcycles it to 4t4i with fresh or copied gates, with and without
Gumbel noise, and trains each for half as many steps, with a new schedule, from the seed's position in the data. For
comparison the seed itself is trained in the same way. One process; resumable; after `make data`. Writes
benchmarks/results/<date>-upcycle.md.
"""

import json
import statistics
import subprocess
import sys

from moe_dist.checkpoint.manifest import newest_complete
from moe_dist.convert.upcycle import upcycle
from moe_dist.metrics.run_folder import RunFolder
from runs import ROOT, moma, write_result

RUNS = ROOT / "runs" / "benchmark" / "upcycle"
WAYS = {  # name -> experts, gates, Gumbel noise
    "1t1i goes on": ("1t1i", "copied", False),
    "fresh gates": ("4t4i", "fresh", False),
    "fresh gates, Gumbel noise": ("4t4i", "fresh", True),
    "copied gates": ("4t4i", "copied", False),
    "copied gates, Gumbel noise": ("4t4i", "copied", True),
}
MEAN = 10  # steps over which a loss is averaged
HEADER = "| start | first step | jump | steps to recover | last steps | against 1t1i | held-out text | held-out image |"
NOTE = (
    "Nats per token. First step: the training loss before any update, on a batch that all variants share. Jump: the "
    "difference to the seed on that batch. Recovered: the first step from which the mean over {mean} steps is at most "
    "the seed's own last {mean} ({seed:.3f}). Last steps: mean over the last {mean} of {steps}. Against 1t1i: "
    "difference to the seed, trained further in the same way. With Gumbel noise, training losses include the noise "
    "and held-out losses do not. All losses are non-causal."
)


def router(experts: str, noise: bool = False) -> str:
    text, image = map(int, experts.removesuffix("i").split("t"))
    return f"model.ffn.router={moma(text, image, gumbel_noise=noise)}"


def train(name: str, steps: int, settings: list[str]) -> RunFolder:
    """Train the quickstart's recipe with these settings to its end, unless that run exists already."""
    folder = RunFolder(RUNS / name.replace(", ", "_").replace(" ", "_"))
    schedule = [f"train.steps={steps}", "checkpoint.every=0", f"eval.every={steps}", "parallel.expert=1"]
    command = [sys.executable, "launch/train.py", "--config", "configs/moma_quickstart.yaml"]
    subprocess.run([*command, *settings, *schedule, f"run.dir={folder.path.relative_to(ROOT)}"], cwd=ROOT, check=True)
    return folder


def losses(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def mean(lines: list[dict]) -> float:
    return statistics.mean(line["loss"] for line in lines)


def continued(name: str, seed: RunFolder, steps: int, settings: list[str]) -> list[dict]:
    experts, gates, noise = WAYS[name]
    out = RUNS / f"start_{name.replace(', ', '_').replace(' ', '_')}"
    if not out.exists():
        children = [f"model.ffn.router.{name}.gumbel_noise={str(noise).lower()}" for name in ("text", "image")]
        upcycle(seed.path, out, experts=experts, gates=gates, overrides=children)  # type: ignore[arg-type]
    start = f"init_from={{checkpoint: {out.relative_to(ROOT)}, data_position: true}}"
    return losses(train(name, steps, [*settings, router(experts, noise), start]))


def row(name: str, lines: list[dict], control: list[dict], seed: float) -> str:
    windows = [mean(lines[start : start + MEAN]) for start in range(len(lines) - MEAN + 1)]
    recovered = next((str(start + 1) for start, value in enumerate(windows) if value <= seed), "not")
    first, last = lines[0]["loss"], windows[-1]
    cells = [
        name,
        f"{first:.3f}",
        f"{first - control[0]['loss']:+.3f}",
        recovered,
        f"{last:.3f}",
        f"{last - mean(control[-MEAN:]):+.3f}",
        *(f"{lines[-1][f'eval/loss/{modality}']:.3f}" for modality in ("text", "image")),
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str]) -> None:
    settings = [argument for argument in argv if "=" in argument]
    steps = next((int(argument) for argument in argv if argument.isdecimal()), 320)
    seed = train("seed", steps, [*settings, router("1t1i")])
    assert newest_complete(seed.path)
    level = mean(losses(seed)[-MEAN:])
    found = {name: continued(name, seed, steps // 2, settings) for name in WAYS}
    control = next(iter(found.values()))
    rows = [row(name, lines, control, level) for name, lines in found.items()]
    note = NOTE.format(mean=MEAN, seed=level, steps=steps // 2)
    write_result("upcycle", "Upcycling 1t1i to 4t4i under expert choice", note, HEADER, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
