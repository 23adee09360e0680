"""The head of each sbatch script, without Slurm: it finds the shared body, and its recipe is the one that is read."""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

SCRIPTS = {
    "pretrain_moma": "moma_quickstart",
    "finetune_adamoe": "adamoe_quickstart",
    "finetune_llava_mole": "llava_mole_quickstart",
    "align_roma": "roma_quickstart",
}
JOB = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "n1", "SITE": "none"}


@pytest.mark.parametrize("answers", [True, False], ids=["the controller answers", "it is busy"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copy_of_the_script_finds_its_body_and_recipe(script, answers, tmp_path):
    """As Slurm runs it: a copy elsewhere, submitted with a path among its arguments. What is wrong names the recipe.

    The checkout is below folders that have .sh and a blank in their names.
    """
    checkout = tmp_path / "lab.sh" / "my.sh work" / "checkout"
    checkout.parent.mkdir(parents=True)
    checkout.symlink_to(ROOT)
    command = f"   Command={checkout}/slurm/{script}.sh run.dir=/scratch/a.sh/b" if answers else ""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\ncase $2 in job) echo "{command}" ;; *) echo n1 ;; esac\n')
    (tmp_path / "scontrol").chmod(0o755)
    copy = tmp_path / "slurm_script"
    copy.write_text((ROOT / "slurm" / f"{script}.sh").read_text())
    path = f"{tmp_path}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    variables = os.environ | JOB | {"PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path if answers else ROOT)}
    variables.pop("CONFIG", None)
    done = subprocess.run(["bash", copy, "train.stpes=3"], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 2
    sentence = f"error: configs/{SCRIPTS[script]}.yaml: unknown key 'train.stpes' (did you mean 'steps'?)\n"
    assert done.stdout + done.stderr == sentence


def test_the_scripts_differ_in_what_only_they_can_say():
    own = ("# ", "#SBATCH --job-name=", "recipe=")
    texts = [(ROOT / "slurm" / f"{script}.sh").read_text().splitlines() for script in SCRIPTS]
    shared = {tuple(line for line in text if not line.startswith(own)) for text in texts}
    assert len(shared) == 1 and max(map(len, texts)) < 12
