"""Faults for one node's ranks of a Slurm job, told by the environment; Python imports this file at its start.

PLANT: which. A fault that is planted once is not there when Slurm starts the job again.
"""

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path

FAULT = os.environ.get("PLANT", "")
SECOND_NODE = os.environ.get("SLURM_NODEID") == "1"
IS_RANK = b"launch/train.py" in Path("/proc/self/cmdline").read_bytes().split(b"\0")


def after_import(module, change):
    """Call change(module) once it has been imported."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name != module:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda loaded: (run(loaded), change(loaded))
            return spec

    sys.meta_path.insert(0, Finder())


def hang_at_step_3(train):
    step = train.Run.train_step

    def planted_hang(run):
        while run.step == 2:
            time.sleep(0.1)
        return step(run)

    train.Run.train_step = planted_hang


def other_torch(health):
    version = health._version
    health._version = lambda package: "1.13.0" if package == "torch" else version(package)


if IS_RANK and FAULT == "crash":
    os._exit(3)
if IS_RANK and SECOND_NODE:
    if FAULT == "hang once" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        after_import("moe_dist.training.run", hang_at_step_3)
    if FAULT == "other torch":
        after_import("moe_dist.health.before_training", other_torch)
