"""MoMa's efficiency study on one GPU in a few minutes: dense, moe_8x, 1t1i, 4t4i and MoD + 4t4i at width 256.

  python benchmarks/moma_eta.py --prepare-gpu                                        on any machine, once
  python benchmarks/moma_eta.py --gpu --sweep --jobs 5 --seconds 300 --out DIR       on the GPU
  python benchmarks/moma_eta.py --gpu --write-only --out DIR                         anywhere

--prepare-gpu draws all batches through the loader and writes data/eta_gpu.npz.xz, the only input.

--gpu trains --jobs models at a time, each in its own process on the same card: a step of such a small model consists of
kernel launches, which overlap. Every model saves its curve to DIR/MODEL.json every few seconds. A finished model is not
trained again; an interrupted one starts again.

--sweep first trains dense and 4t4i for a quarter of the steps at each of --rates and takes the rate with the lowest sum
of their losses. If --seconds is too short for all steps, it lowers their number. It writes DIR/plan.json, which later
calls follow.

--write-only writes benchmarks/results/<date>-moma_eta_gpu.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from gpu.eta_job import Job, read_curve
from gpu.findings import ROOT

NAMES = ("dense", "moe_8x", "1t1i", "4t4i", "MoD 4t4i")
INPUTS = ROOT / "data" / "eta_gpu.npz.xz"
SEQUENCE, GROUP = 512, 64  # tokens of a sequence, sequences that compete: a micro-batch and an optimizer step
RATE, RATES = 4e-3, (2e-3, 4e-3, 8e-3)  # the rate without a sweep; the rates of the sweep
SWEPT, SHARE = ("dense", "4t4i"), 4  # models of the sweep, and the fraction of the steps: 1 / SHARE
PACE, PACE_STEPS = "MoD 4t4i", 40  # the slowest model: trained with the sweep to time its steps
SWEEP_TIME = 0.35  # of --seconds, at most
TOKENS, SPARE = 30_000_000, 3_500_000  # spare: tokens in the inputs beyond the default
EVALUATIONS, HELD_OUT_GROUPS = 20, 12
START, GRACE = 25.0, 20.0  # seconds for a process to start; seconds after the deadline before it is killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="passed on by moma_eta.py")
    parser.add_argument("--prepare-gpu", action="store_true")
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--inputs", type=Path, default=INPUTS)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "moma_eta_gpu")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="training tokens of each model")
    parser.add_argument("--batch-tokens", type=int, default=SEQUENCE * GROUP, help="must equal that of the inputs")
    parser.add_argument("--models", type=split, default=NAMES, help=",".join(NAMES))
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument(
        "--rates", type=lambda text: tuple(map(float, split(text))), default=RATES, help="learning rates of the sweep"
    )
    parser.add_argument("--jobs", type=int, default=len(NAMES))
    parser.add_argument("--seconds", type=float, default=300, help="time limit of the whole study")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    if arguments.child:
        from gpu.eta_run import run  # imports DeepSpeed, which the parent does not need

        run(Job(**json.loads(arguments.child)))
    elif arguments.prepare_gpu:
        prepare_inputs(arguments)
    elif arguments.write_only:
        from gpu.eta_page import write_page

        write_page(arguments.out, NAMES, arguments.results)
    else:
        sys.exit(Study(arguments).run())


def split(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def prepare_inputs(arguments: argparse.Namespace) -> None:
    """Write the inputs. Build the corpora and tokenizers of the CPU study if they are missing."""
    from gpu.eta_data import write_inputs
    from moma_study import BASE, prepare

    if not any(setting.startswith("data.shards=") for setting in arguments.overrides):
        prepare()
    base = [setting for setting in BASE if setting.startswith("data.")]
    shape = [f"data.sequence_length={SEQUENCE}", f"data.group_sequences={GROUP}", "data.lanes=1"]
    batches = (arguments.tokens + SPARE) // (SEQUENCE * GROUP)
    settings = [*base, *shape, *arguments.overrides]
    write_inputs(arguments.inputs, settings, batches=batches, held_out=HELD_OUT_GROUPS)
    print(f"{arguments.inputs}: {arguments.inputs.stat().st_size / 1e6:.1f} MB")


class Study:
    """The whole job: one process per model, until all are done or the time is over."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.out, self.started = arguments.out, time.time()
        self.deadline = self.started + arguments.seconds
        self.out.mkdir(parents=True, exist_ok=True)
        self.plan_file = self.out / "plan.json"

    def run(self) -> int:
        """Return the exit status: 0 if every model is done."""
        plan = self._plan()
        jobs = [self._job(name, self.out, **plan) for name in self.arguments.models]
        left = [job for job in jobs if not job.is_done()]
        self._train(left, min(len(left), self.arguments.jobs), self.deadline)
        for job in jobs:
            print(said(job), flush=True)
        return int(not all(job.is_done() for job in jobs))

    def _plan(self) -> dict[str, Any]:
        """Return the rate and the number of steps of all models: those of an earlier call, or those that the sweep
        chooses.
        """
        if not self.plan_file.exists():
            plan = {"rate": self.arguments.rate, "steps": self.arguments.tokens // self.arguments.batch_tokens}
            if self.arguments.sweep:
                plan |= self._sweep(plan["steps"])
            self.plan_file.write_text(json.dumps(plan, indent=1) + "\n")
        plan = json.loads(self.plan_file.read_text())
        print(f"plan: {plan}", flush=True)
        return {key: plan[key] for key in ("rate", "steps")}

    def _sweep(self, steps: int) -> dict[str, Any]:
        """Train SWEPT at --rates, then choose the rate and the number of steps that fits the time.

        The step time is measured on the slowest model while the whole sweep runs. More processes run then than later,
        so the estimate is safe.
        """
        folder, few = Path(tempfile.mkdtemp(prefix="moma_eta_sweep-")), max(steps // SHARE, 1)
        runs = [(rate, name, few) for rate, name in product(self.arguments.rates, SWEPT)]
        runs.append((self.arguments.rates[0], PACE, min(few, PACE_STEPS)))
        try:
            jobs = [replace(self._job(name, folder / f"{rate:g}", rate, n), evaluations=1) for rate, name, n in runs]
            self._train(jobs, len(jobs), self.started + SWEEP_TIME * self.arguments.seconds)
            curves = [(job, read_curve(Path(job.file))) for job in jobs]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        *swept, (_, pace) = curves
        found = chosen(swept) | {"step_seconds": step_seconds(pace)}
        fitting = max(int((self.deadline - time.time() - START) / max(found["step_seconds"], 1e-3)), 1)
        if fitting < steps:
            print(f"{steps} steps would not finish in time: taking {fitting}", flush=True)
        return found | {"steps": min(steps, fitting)}

    def _job(self, name: str, folder: Path, rate: float, steps: int) -> Job:
        folder.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        return Job(
            name=name,
            rate=rate,
            steps=steps,
            evaluations=min(EVALUATIONS, steps),
            command=command,
            inputs=str(self.arguments.inputs.resolve()),
            file=str(folder / f"{name.replace(' ', '_')}.json"),
            deadline=self.deadline,
            overrides=self.arguments.overrides,
        )

    def _train(self, jobs: Sequence[Job], at_once: int, deadline: float) -> None:
        ready = [replace(job, beside=at_once, deadline=deadline) for job in jobs]
        with ThreadPoolExecutor(max(at_once, 1)) as pool:
            list(pool.map(self._process, ready))

    def _process(self, job: Job) -> None:
        """Train one model in its own process group, and kill it if it outlasts the deadline."""
        if time.time() > job.deadline - 1:
            return
        command = [sys.executable, str(Path(__file__)), "--child", json.dumps(asdict(job))]
        process = subprocess.Popen(command, env=self._environment(), cwd=ROOT, start_new_session=True)
        code: int | str = "killed after the deadline"
        try:
            code = process.wait(max(job.deadline - time.time(), 0) + GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code:
            print(f"{job.name}, rate {job.rate:g}: exit status {code}", flush=True)

    def _environment(self) -> dict[str, str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        own = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own |= {"DS_ACCELERATOR": self.arguments.device, "OMP_NUM_THREADS": "1"}
        own["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        own |= {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        return os.environ | own


def chosen(swept: Sequence[tuple[Job, dict[str, Any]]]) -> dict[str, Any]:
    """Return the rate with the lowest sum of the swept models' training losses, and these losses.

    A loss is the mean over the last tenth of the steps that all runs have reached. If a run finished less than half of
    its steps (it diverged), neither it nor its rate counts.
    """
    usable = [(job, curve["train"]["loss"]) for job, curve in swept if curve and 2 * curve["reached"] >= job.steps]
    last = min((len(loss) for _, loss in usable), default=0)
    losses: dict[str, dict[str, float]] = {}
    for job, loss in usable:
        mean = statistics.mean(loss[last - max(last // 10, 1) : last])
        losses.setdefault(f"{job.rate:g}", {})[job.name] = round(mean, 4)
    whole = {rate: sum(found.values()) for rate, found in losses.items() if len(found) == len(SWEPT)}
    best = float(min(whole, key=lambda rate: whole[rate])) if whole else RATE
    return {"rate": best, "sweep": losses, "sweep_step": last}


def step_seconds(curve: dict[str, Any]) -> float:
    """Median seconds of a step; 0 if fewer than two were taken."""
    seconds = curve["train"].get("seconds", []) if curve else []
    return round(statistics.median([b - a for a, b in pairwise(seconds)]), 4) if len(seconds) > 1 else 0.0


def said(job: Job) -> str:
    curve = read_curve(Path(job.file))
    if not curve or not curve["train"]:
        return f"{job.name}: not started"
    train, state = curve["train"], "done" if job.is_done() else "cut off"
    return (
        f"{job.name}: {state} at step {curve['reached']} of {job.steps}, {train['tokens'][-1] / 1e6:.1f} M tokens, "
        f"{train['seconds'][-1]:.0f} s, training loss {train['loss'][-1]:.3f}, "
        f"held-out {(curve['held_out'].get('loss') or [float('nan')])[-1]:.3f}"
    )


if __name__ == "__main__":
    main()
