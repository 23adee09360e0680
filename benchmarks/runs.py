"""Train a recipe, evaluate it and write the results: shared by the benchmarks that train."""

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
# Environment of runs on the CPU: one thread per rank, as `make train` sets it on two cores.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}


def train_and_evaluate(recipe: str) -> tuple[list[dict], dict, float]:
    """Return the lines of metrics.jsonl, the results of launch/evaluate.py, and a rank's peak memory in GiB.

    Uses two ranks. Resumable: a finished run is only evaluated again; its memory is then not known, and the number too
    small.
    """
    folder = RunFolder(ROOT / "runs" / "benchmark" / recipe)
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "launch/train.py"]
    peak = peak_gib([*launcher, "--config", f"configs/{recipe}.yaml", f"run.dir={folder.path}"])
    subprocess.run([sys.executable, "launch/evaluate.py", str(folder.path), "eval.groups=64"], cwd=ROOT, check=True)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return lines, json.loads((folder.path / "evaluation.json").read_text()), peak


def expert_choice(num_experts: int, **settings: bool) -> str:
    """Return the YAML of an expert-choice router."""
    given = "".join(f", {key}: {str(value).lower()}" for key, value in settings.items())
    return f"{{type: expert_choice, num_experts: {num_experts}{given}}}"


def moma(text: int, image: int, **settings: bool) -> str:
    """Return the YAML of MoMa's router with this number of experts of each modality."""
    return f"{{type: modality, text: {expert_choice(text, **settings)}, image: {expert_choice(image, **settings)}}}"


def seconds(lines: Sequence[dict]) -> float:
    """Sum the seconds of all training steps."""
    return sum(line["step_seconds"] for line in lines)


def flops(lines: Sequence[dict]) -> float:
    """Sum the FLOPs of all training steps, by the formula of metrics/flops.py."""
    return sum(line["model_flops_per_second"] * line["step_seconds"] for line in lines)


def tokens_per_second(lines: Sequence[dict]) -> float:
    return statistics.median(line["tokens_per_second"] for line in lines)


def peak_gib(command: Sequence[str]) -> float:
    """Run a command and return the resident memory of the largest process it started: a rank."""
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_maxrss / 2**20


def table(header: str, rows: Sequence[str]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [header, "|" + "---|" * (header.count("|") - 1), *rows]


def processor() -> str:
    """Name the processor and say whether it has AVX-512: with and without it kernels differ, and so does rounding."""
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

    ran: machine and command, if the numbers come from another machine. day: the day of the run; default today.
    """
    day = day or str(date.today())
    out = folder / f"{day}-{name}.md"
    lines = [f"# {title}, {day}", "", ran or this_run(), "", note, "", *table(header, rows)]
    out.write_text("\n".join(lines) + "\n")
    print(out.read_text())


def this_run() -> str:
    """Describe this machine in words, and return the command line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"{os.cpu_count()} cores ({processor()}), {memory:.0f} GiB, {platform.machine()}, no GPU. `{command}`"
