"""Train a recipe, evaluate it, and write down what was seen: shared by the benchmarks that train."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from moe_dist.metrics.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# Of runs on the CPU, one thread a rank, as `make train` sets it on two cores.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}


def train_and_evaluate(recipe: str) -> tuple[list[dict], dict, float]:
    """The lines of metrics.jsonl, what launch/evaluate.py found, and a rank's peak memory in GiB.

    Two ranks. Resumable: a run that is done is only evaluated again (and its memory is then not known: too small).
    """
    folder = RunFolder(ROOT / "runs" / "benchmark" / recipe)
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "launch/train.py"]
    peak = peak_gib([*launcher, "--config", f"configs/{recipe}.yaml", f"run.dir={folder.path}"])
    subprocess.run([sys.executable, "launch/evaluate.py", str(folder.path), "eval.groups=64"], cwd=ROOT, check=True)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return lines, json.loads((folder.path / "evaluation.json").read_text()), peak


def expert_choice(num_experts: int, **settings: bool) -> str:
    """A recipe's text of an expert-choice router."""
    given = "".join(f", {key}: {str(value).lower()}" for key, value in settings.items())
    return f"{{type: expert_choice, num_experts: {num_experts}{given}}}"


def moma(text: int, image: int, **settings: bool) -> str:
    """A recipe's text of MoMa's router, with so many experts of each modality."""
    return f"{{type: modality, text: {expert_choice(text, **settings)}, image: {expert_choice(image, **settings)}}}"


def seconds(lines: Sequence[dict]) -> float:
    """Of all training steps together."""
    return sum(line["step_seconds"] for line in lines)


def flops(lines: Sequence[dict]) -> float:
    """Of all training steps together, by the formula of metrics/flops.py."""
    return sum(line["model_flops_per_second"] * line["step_seconds"] for line in lines)


def tokens_per_second(lines: Sequence[dict]) -> float:
    return statistics.median(line["tokens_per_second"] for line in lines)


def peak_gib(command: Sequence[str]) -> float:
    """Run a command; the resident memory of the largest process it started: a rank."""
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_maxrss / 2**20


def table(header: str, rows: Sequence[str]) -> list[str]:
    """Lines of a Markdown table."""
    return [header, "|" + "---|" * (header.count("|") - 1), *rows]


def processor() -> str:
    """The processor's name, and whether it has AVX-512: kernels, and so roundings, differ between the two kinds."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    wide = "with" if "avx512f" in fields.get("flags", "").split() else "without"
    return f"{fields.get('model name', 'unknown')} {wide} AVX-512"


def write_result(
    name: str,
    title: str,
    note: str,
    header: str,
    rows: Sequence[str],
    *,
    ran: str | None = None,
    day: str | None = None,
    folder: Path = ROOT / "benchmarks" / "results",
) -> None:
    """Write FOLDER/<day>-<name>.md: the machine in words, the command, a note, a table.

    ran: machine and command, if the numbers are from another machine than this one; day: of the run, default today.
    """
    day = day or str(date.today())
    out = folder / f"{day}-{name}.md"
    lines = [f"# {title}, {day}", "", ran or this_run(), "", note, "", *table(header, rows)]
    out.write_text("\n".join(lines) + "\n")
    print(out.read_text())


def this_run() -> str:
    """This machine in words, and the command."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"{os.cpu_count()} cores ({processor()}), {memory:.0f} GiB, {platform.machine()}, no GPU. `{command}`"
