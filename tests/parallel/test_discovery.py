"""Rank discovery: under a real mpiexec and a real torchrun, and from the environments that Slurm and mpiexec set."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist.core.errors import UserError
from moe_dist.parallel.discovery import Place, discover, first_host, is_main_process
from tests.support import ROOT

TOOLS = Path(sys.executable).parent
# Meets the other ranks for real: the sum over ranks of rank + 1 shows that all of them are there.
PROBE = """
import dataclasses, json, sys, torch, torch.distributed as dist
from moe_dist.parallel.discovery import discover
place = discover()
place.export()
dist.init_process_group("gloo")
total = torch.tensor(place.rank + 1)
dist.all_reduce(total)
dist.destroy_process_group()
with open(f"{sys.argv[1]}/{place.rank}.json", "w") as file:
    json.dump(dataclasses.asdict(place) | {"total": int(total)}, file)
"""


def launch(folder, command):
    script = folder / "probe.py"
    script.write_text(PROBE)
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "PMI", "OMPI", "SLURM")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def check(places, launcher):
    assert [place["rank"] for place in places] == [0, 1]
    assert [place["local_rank"] for place in places] == [0, 1]
    assert {(place["world"], place["total"], place["launcher"]) for place in places} == {(2, 3, launcher)}
    assert len({(place["master_addr"], place["master_port"]) for place in places}) == 1


def test_mpiexec(tmp_path):
    check(launch(tmp_path, [TOOLS / "mpiexec", "-n", "2", sys.executable]), "mpi")


@pytest.mark.slow
def test_torchrun(tmp_path):
    check(launch(tmp_path, [TOOLS / "torchrun", "--standalone", "--nproc_per_node=2"]), "environment")


@pytest.mark.slow
def test_alone(tmp_path):
    (place,) = launch(tmp_path, [sys.executable])
    assert (place["rank"], place["world"], place["total"], place["launcher"]) == (0, 1, 1, "single")


SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "2",
}


def test_srun():
    place = discover(SRUN)
    assert place == Place(
        rank=3, world=4, local_rank=1, master_addr="n07", master_port=place.master_port, launcher="slurm"
    )
    other = discover(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert other.master_port == place.master_port, "every task must name the same port"
    assert discover(SRUN | {"SLURM_STEP_ID": "3"}).master_port != place.master_port, "steps of a job must not meet"
    assert discover(SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}).launcher == "slurm", "srun --mpi=pmi2 sets both"
    given = discover(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "2345"})
    assert (given.master_addr, given.master_port) == ("10.0.0.1", 2345)


def test_launchers_inside_an_allocation_win_over_slurm():
    """sbatch's own variables are inherited by torchrun, deepspeed and mpiexec started inside the job."""
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert discover(SRUN | torchrun) == Place(
        rank=1, world=2, local_rank=1, master_addr="h", master_port=1, launcher="environment"
    )


@pytest.mark.slow
def test_mpiexec_inside_an_allocation(tmp_path):
    """The batch step is one task: both MPI ranks inherit SLURM_PROCID=0."""
    command = ["env", "SLURM_PROCID=0", "SLURM_STEP_NUM_TASKS=1", "SLURM_JOB_ID=5", "SLURM_STEP_NODELIST=localhost"]
    check(launch(tmp_path, [*command, TOOLS / "mpiexec", "-launcher", "fork", "-n", "2", sys.executable]), "mpi")


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_named(missing):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    del environment[missing]
    with pytest.raises(UserError, match=missing):
        discover(environment)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "one"}, "RANK=one, which is not a non-negative integer"),
        ({"RANK": "-1"}, "RANK=-1, which is not a non-negative integer"),
        ({"RANK": "2"}, "RANK=2, but WORLD_SIZE=2 ranks are numbered from 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, which is not a non-negative integer"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK=1.5, which is not a non-negative integer"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http, which is not a non-negative integer"),
    ],
)
def test_an_environment_that_makes_no_sense_is_named(environment, sentence):
    complete = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    with pytest.raises(UserError, match=sentence):
        discover(complete | environment)


def test_a_slurm_variable_that_makes_no_sense_is_named():
    with pytest.raises(UserError, match="SLURM_PROCID=x, which is not a non-negative integer"):
        discover(SRUN | {"SLURM_PROCID": "x"})


@pytest.mark.parametrize(
    ("environment", "main"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "1"}, False), ({"RANK": "one"}, True), ({"PMI_RANK": "3"}, False)],
)
def test_who_speaks_for_all(environment, main):
    assert is_main_process(environment) is main


ENDING = """
import atexit, sys, torch.distributed as dist
from moe_dist.parallel.discovery import discover, run_rank
def main():
    discover().export()
    dist.init_process_group("gloo")
    atexit.register(lambda: print("open" if dist.is_initialized() else "closed"))
run_rank(main)
"""


def test_the_process_group_is_closed_at_a_clean_end():
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "PMI", "OMPI", "SLURM")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ENDING], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert (run.stdout, run.stderr) == ("closed\n", "")


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-4]", "n1"),
        ("n[07-09,12],m3", "n07"),
        ("a[3,5]-ib", "a3-ib"),
        ("rack[1-2]node[04-08]", "rack1node04"),
        ("127.0.1.[1-2]", "127.0.1.1"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


WAITING = """
import os, signal, sys, time
from moe_dist.parallel import mpi_start
from moe_dist.parallel.discovery import discover
from moe_dist.parallel.signals import StopSignals
mpi_start.SILENCE = 0.3
rank = os.environ["PMI_RANK"]
with open(f"{sys.argv[1]}/{rank}.txt", "w") as file:
    file.write(str(os.getpid()))
while rank == "1" and not os.path.exists(f"{sys.argv[1]}/come"):
    time.sleep(0.02)
with StopSignals() as stop:
    rank = discover().rank
    os.kill(os.getpid(), signal.SIGUSR1)
    sys.stderr.write(f"met {rank}, signal {stop.received}\\n")
"""


@pytest.fixture
def waiting(tmp_path):
    """Start two ranks under mpiexec, of which rank 1 comes when the file `come` exists."""
    script = tmp_path / "probe.py"
    script.write_text(WAITING)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "SLURM", "RANK"))}
    command = [TOOLS / "mpiexec", "-n", "2", sys.executable, str(script), str(tmp_path)]
    environment |= {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as ranks:
        yield ranks
        ranks.terminate()


def test_a_wait_in_mpi_is_reported(waiting, tmp_path):
    assert waiting.stderr.readline() == "rank 0: waiting in MPI_Init for the other ranks of mpiexec\n"
    (tmp_path / "come").touch()
    met = [line for line in waiting.stderr if "waiting" not in line]  # a slow rank 1 may report a wait of its own
    assert sorted(met) == ["met 0, signal 10\n", "met 1, signal 10\n"], "MPICH keeps no signal"
    assert waiting.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_wait_in_mpi(waiting, tmp_path, number):
    assert "waiting in MPI_Init" in waiting.stderr.readline()
    os.kill(int((tmp_path / "0.txt").read_text()), number)
    assert waiting.wait(60) != 0
    assert "met" not in waiting.stderr.read()
