"""Check that two commits train the same, bit for bit: losses, gradient norms and final parameters of 12 steps on two
ranks.

    python benchmarks/same_bits.py OLD [NEW] [--recipes NAME ...] [--steps 12] [--work DIR]

Checks out each commit with `git worktree` and runs every recipe of the commit's own configs/ on the data of this
checkout (`make data CONFIG=...` builds them), with one thread per rank. If there is a difference, names the first one
and exits with 1. Use it for a refactoring that must not change training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = (
    "moma",
    "mod_moma",
    "moe_8x",
    "dense",
    "adamoe",
    "llava_mole",
)  # dense before llava_mole, which starts from it
FIGURES = ("loss", "grad_norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--work", type=Path, default=None, help="keep worktrees and runs here")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="same_bits-"))
    differences = 0
    trees = [check_out(commit, work) for commit in (arguments.old, arguments.new)]
    try:
        for recipe in arguments.recipes:
            old, new = (train(tree, recipe, arguments.steps) for tree in trees)
            difference = first_difference(old, new)
            differences += difference is not None
            print(f"{recipe}: {difference or f'the same {len(old)} figures and digests'}", flush=True)
    finally:
        for tree in trees if arguments.work is None else ():
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    sys.exit(bool(differences))


def check_out(commit: str, work: Path) -> Path:
    name = subprocess.run(["git", "rev-parse", commit], cwd=ROOT, check=True, capture_output=True, text=True)
    tree = work / name.stdout.strip()
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", "-q", str(tree), commit], cwd=ROOT, check=True)
        (tree / "data").symlink_to(ROOT / "data")
    return tree


def train(tree: Path, recipe: str, steps: int) -> dict[str, str]:
    """Return every number of every step, and the digest of every tensor file of the last checkpoint."""
    folder = tree / "runs" / "same_bits" / recipe
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["launch/train.py", "--config", f"configs/{recipe}_quickstart.yaml", f"run.dir={folder}"]
    command += [f"train.stop_after={steps}", "eval.every=0", "checkpoint.every=0", "telemetry.tensorboard=false"]
    if recipe == "llava_mole":
        command.append(f"init_from.checkpoint={folder.parent / 'dense'}")
    own = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=tree, env=own, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{recipe} at {tree.name[:10]}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen = {f"{key} of step {line['step']}": repr(line[key]) for line in lines for key in FIGURES if key in line}
    (saved,) = (folder / "checkpoints").glob("step_*")
    for file in sorted(saved.glob("*.safetensors")):
        seen[f"tensors of {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return seen


def first_difference(old: dict[str, str], new: dict[str, str]) -> str | None:
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) != new.get(name):
            return f"{name} is {new.get(name)} and was {old.get(name)}"
    return None


if __name__ == "__main__":
    main()
