"""The shipped scripts on a real two-node Slurm cluster: start modes, a site's settings, and logs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.launching import BIN

pytestmark = pytest.mark.slow
NODES = ("127.0.1.1", "127.0.1.2")


def test_the_shipped_script_trains(undisturbed):
    """The job gets GPUs that Slurm believes in, in the partition of SBATCH_PARTITION."""
    log, shown, run = undisturbed.log, undisturbed.shown, undisturbed.run
    assert (shown["JobName"], shown["Partition"], shown["NodeList"]) == ("moma", "urgent", "127.0.1.[1-2]")
    for part in (
        f"127.0.1.1: rank 0 on cpu\n127.0.1.2: rank 1 on cpu\npython {sys.version.split()[0]}, torch ",
        "all-to-all correct",
        "step 20/20 | non-causal loss",  # rank 0's progress
        f"done after 20 of 20 steps: {run}",
        f"logs of all ranks: {run}/logs/{undisturbed.job}.0",
        f"run folder: {run}",
    ):
        assert part in log, log
    logs = run / "logs" / f"{undisturbed.job}.0"
    assert sorted(path.name for path in logs.iterdir()) == ["rank-0.log", "rank-1.log"]
    assert [rank["host"] for rank in json.loads((run / "health.json").read_text())["ranks"]] == list(NODES)
    assert "loaded cuda/12 gcc" in log, "MODULES of the site's settings"
    assert [line["step"] for line in undisturbed.metrics] == list(range(1, 21))


def test_a_run_that_is_done_does_not_start_again(slurm, undisturbed):
    job = slurm.sbatch("pretrain_moma.sh", *undisturbed.overrides)
    slurm.ended(job)
    assert slurm.log(job) == f"{undisturbed.run} is done: nothing is left to train\n"
    assert len(list((undisturbed.run / "logs").iterdir())) == 1


@pytest.mark.parametrize(
    ("script", "recipe"),
    [
        ("finetune_adamoe.sh", "adamoe_quickstart"),
        ("finetune_llava_mole.sh", "llava_mole_quickstart"),
        ("align_roma.sh", "roma_quickstart"),
        ("pretrain_moma.sh", "dense_quickstart"),
    ],
)
def test_a_wrong_configuration_fails_before_the_ranks_start(slurm, script, recipe):
    """Each script has a recipe, unless CONFIG= names another. The log has only the error sentence."""
    variables = {"CONFIG": f"configs/{recipe}.yaml"} if script == "pretrain_moma.sh" else {}
    job = slurm.sbatch(script, "train.stpes=3", **variables)
    shown = slurm.ended(job, "FAILED")
    assert (shown["ExitCode"], shown["Restarts"]) == ("2:0", "0")
    sentence = f"error: configs/{recipe}.yaml: unknown key 'train.stpes' (did you mean 'steps'?)\n"
    assert slurm.log(job) == sentence


@pytest.mark.parametrize("start", ["srun", "deepspeed"])
def test_what_only_the_ranks_find_wrong_is_not_started_again_either(slurm, tiny, start):
    job = slurm.sbatch("pretrain_moma.sh", *tiny, "parallel.expert=3", START=start)
    shown = slurm.ended(job, "FAILED")
    assert (shown["ExitCode"], shown["Restarts"]) == ("2:0", "0")
    log = slurm.log(job)
    assert log.count("error: parallel.expert=3 does not divide the 2 ranks of this run") == 1, log
    assert "restarting cannot help" in log and "Traceback" not in log


def test_a_node_with_another_torch_is_named(slurm, tiny, planted):
    job = slurm.sbatch("pretrain_moma.sh", *tiny, **planted("other torch"))
    shown = slurm.ended(job, "FAILED")
    assert (shown["ExitCode"], shown["Restarts"]) == ("2:0", "0")
    assert "error: the ranks do not match: torch is 1.13.0 on 127.0.1.2 (rank 1), but " in slurm.log(job)


def test_a_sibling_trains_on_the_ranks_of_one_node_in_a_container(slurm, tiny, tmp_path):
    """There is no container runtime here. A stand-in records its options and calls the real srun."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(
        f'#!/bin/bash\nexport PATH={BIN}:$PATH\necho "$@" >> {tmp_path}/srun.txt\nkept=()\n'
        'for each; do [[ $each == --container-* ]] || kept+=("$each"); done\n'
        f'exec {shutil.which("srun", path=slurm.environment["PATH"])} "${{kept[@]}}"\n'
    )
    srun.chmod(0o755)
    site = tmp_path / "site.sh"
    site.write_text(f"CONTAINER=/images/moe.sqsh CONTAINER_MOUNTS=/data:/data\nPATH={srun.parent}:$PATH\n")
    text = [each for each in tiny if not each.startswith("data.image_tokenizer")]
    job = slurm.sbatch(
        "finetune_adamoe.sh", *text, "train.stop_after=1", options=("-N1", "--ntasks-per-node=2"), SITE=str(site)
    )
    shown = slurm.ended(job)
    assert shown["NumNodes"] == "1"
    assert "stopped after 1 steps: train.stop_after" in slurm.log(job)
    begin, ranks, end = (tmp_path / "srun.txt").read_text().splitlines()
    mounts = f"--container-mounts={ROOT}:{ROOT},/data:/data"
    image = f"--container-image=/images/moe.sqsh --container-workdir={ROOT} {mounts}"
    for line, program in ((begin, "launch/job.py begin"), (ranks, "launch/train.py"), (end, "launch/job.py end")):
        assert f" {image} " in line and program in line


@pytest.mark.parametrize("export", ["NONE", "START=deepspeed"])
def test_a_job_that_inherits_no_environment(slurm, tiny, tmp_path, export):
    """Nothing, or one variable: in a checkout below a folder with .sh in its name, with a variable in a path."""
    checkout = tmp_path / "lab.sh" / "checkout"
    shutil.copytree(ROOT / "slurm", checkout / "slurm", ignore=shutil.ignore_patterns("site.sh"))
    for name in ("moe_dist", "launch", "configs"):
        (checkout / name).symlink_to(ROOT / name)
    site = f"VENV={sys.prefix}\nexport MOE_DIST_SCRATCH={tmp_path}\n"
    (checkout / "slurm" / "site.sh").write_text(site)
    overrides = [*tiny, "run.dir=$MOE_DIST_SCRATCH/run", "train.stop_after=1"]
    job = slurm.sbatch(checkout / "slurm" / "pretrain_moma.sh", *overrides, options=(f"--export={export}",))
    shown = slurm.ended(job)
    assert shown["Restarts"] == "0"
    log = slurm.log(job)
    assert f"stopped after 1 steps: train.stop_after\nrun folder: {tmp_path / 'run'}\n" in log, log
    assert f"by {export.rpartition('=')[2].replace('NONE', 'srun')}; logs of all ranks" in log


MPI = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --output=mpi-%j.log
cd {root}
for rank in "srun --mpi=pmi2" "mpiexec -n 2"; do
  $rank {python} -c '
from mpi4py import MPI
open(f"{folder}/'${{rank%% *}}'-{{MPI.COMM_WORLD.rank}}-of-{{MPI.COMM_WORLD.size}}", "w")'
  $rank {python} launch/train.py --config configs/moma_quickstart.yaml "$@" run.dir="{folder}/${{rank%% *}}" || exit
done
"""


def test_mpi_starts(slurm, tiny, tmp_path):
    """Ranks start as in batch scripts of other programs: with PMI-2 by srun, and with mpiexec in the job."""
    script = tmp_path / "mpi.sh"
    script.write_text(MPI.format(root=ROOT, python=sys.executable, folder=tmp_path))
    job = slurm.sbatch(script, *tiny, "train.stop_after=1", PYTHONPATH=str(ROOT), PATH=f"{BIN}:{os.environ['PATH']}")
    slurm.ended(job)
    found = sorted(path.name for path in tmp_path.glob("*-of-*"))
    assert found == ["mpiexec-0-of-2", "mpiexec-1-of-2", "srun-0-of-2", "srun-1-of-2"]
    losses = [json.loads((tmp_path / name / "metrics.jsonl").read_text())["loss"] for name in ("srun", "mpiexec")]
    assert losses[0] == losses[1]


def test_no_site_file_is_in_the_repository():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert "/slurm/site.sh" in ignored
    example = (ROOT / "slurm" / "site.example.sh").read_text()
    for name in ("MODULES", "CONTAINER", "CONTAINER_MOUNTS", "VENV", "START", "MAX_FAILURES"):
        assert f"{name}=" in example and f"{name}=" in (ROOT / "slurm" / "env.sh").read_text()
    assert Path(ROOT / "slurm" / "site.example.sh").exists()
