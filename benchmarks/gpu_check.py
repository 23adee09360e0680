"""Check whether moe_dist runs on this GPU, whether it is correct, and how fast it is. 300 seconds on one H100.

    python benchmarks/gpu_check.py [--out DIR] [--seconds N] [--only NAME[,NAME]] [--device cpu]

Each part is a process with its own time limit, the most important part first. A part that crashes, hangs or leaves the
device unusable does not stop the others. Each finding is one line of DIR/gpu_check.jsonl and one row of
DIR/gpu_check.md, which is also printed at the end. --device cpu runs the same at small sizes. docs/gpu.md explains the
lines.

Exits with 1 if a finding is wrong, or if a part failed or ran out of time.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu.findings import ROOT, Findings

PARTS = {  # seconds at most
    "machine": 40,
    "products": 60,
    "models": 110,
    "engine": 100,
    "resume": 60,
    "two_ranks": 130,
    "speed": 150,
    "layer": 100,
    "saver": 80,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check")
    parser.add_argument("--seconds", type=float, default=300, help="for all parts together")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - set(PARTS):
        parser.error(f"--only names {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    findings = Findings(arguments.out)
    if arguments.part:
        from gpu.check import Check  # imports torch

        importlib.import_module(f"gpu.{arguments.part}").run(Check(arguments.part, findings, arguments.device))
        return
    findings.clear()
    scratch = tempfile.mkdtemp(prefix="gpu_check-")  # checkpoints and runs
    try:
        end = time.monotonic() + arguments.seconds
        for name in arguments.only.split(","):
            limit = PARTS[name] * (4 if arguments.device == "cpu" else 1)
            run_part(name, min(limit, end - time.monotonic()), findings, arguments.device, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(findings.write_table(), flush=True)
    sys.exit(bool(findings.failures()))


def run_part(name: str, limit: float, findings: Findings, device: str, scratch: str) -> None:
    """Run one part in its own process group, and kill it at the limit."""
    if limit < 15:
        findings.note(name, "part", "LEFT OUT: no time")
        return
    started = time.monotonic()
    command = [sys.executable, __file__, "--part", name, "--out", str(findings.folder), "--device", device]
    process = subprocess.Popen(command, env=environment(device, scratch), start_new_session=True)
    try:
        code = process.wait(limit)
        verdict = "ended" if code == 0 else f"ERROR exit status {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        verdict = f"ERROR stopped after {limit:.0f} s"
    findings.note(name, "part", verdict, seconds=round(time.monotonic() - started, 1))


def environment(device: str, scratch: str) -> dict[str, str]:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    own = os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": device, "GPU_CHECK_SCRATCH": scratch}
    own.setdefault("PYTORCH_ALLOC_CONF", own.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))
    return own


if __name__ == "__main__":
    main()
