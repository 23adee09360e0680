"""No process of a test sees a GPU, so that the suite passes on a machine that has some."""

import os
import subprocess
import sys

from deepspeed.accelerator import get_accelerator

from tests.support.distributed import run_ranks
from tests.support.launching import environment

VARIABLES = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


PROBE = f"import os; print({{name: os.environ.get(name) for name in {list(VARIABLES)}}})"


def _seen(rank=0):
    return {name: os.environ.get(name) for name in VARIABLES}, get_accelerator().device_name()


def test_here_and_in_forked_ranks():
    assert _seen() == (VARIABLES, "cpu")
    assert run_ranks(_seen, 2) == [(VARIABLES, "cpu")] * 2


def test_in_subprocesses():
    seen = subprocess.run([sys.executable, "-c", PROBE], env=environment(), capture_output=True, text=True, check=True)
    assert seen.stdout == f"{VARIABLES}\n"
