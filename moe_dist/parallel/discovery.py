"""Discovery of rank and world size under the DeepSpeed launcher, torchrun, srun and mpiexec, or in a single process.

Sources in order of precedence: RANK and WORLD_SIZE in the environment (DeepSpeed's launcher, torchrun); Slurm's own
variables (srun); mpi4py, if an MPI launcher's variables are set (mpiexec, mpirun); otherwise a single process.

This module also contains run_rank, which runs the `main` function of a launch script and sets the exit status.
"""

from __future__ import annotations

import gc
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

from moe_dist.core.errors import PeerError, UserError, as_user_error
from moe_dist.parallel.mpi_start import start_mpi

# Variables in which MPI launchers pass (rank, world size): MPICH and its derivatives, Open MPI, PMIx.
_MPI_VARIABLES = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMIX_RANK", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This process's place in the run: its rank, the world size, and the address at which all processes meet."""

    rank: int
    world: int
    local_rank: int
    master_addr: str
    master_port: int
    launcher: str  # environment, slurm, mpi or single

    def export(self) -> None:
        """Set the environment variables that torch.distributed and DeepSpeed read."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world),
            LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def discover(environment: Mapping[str, str] = os.environ) -> Place:
    """Find this process's rank and the world size. Collective under MPI.

    Raises UserError if one of the launcher's variables is missing or is not a number.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _from_environment(environment)
    if _started_by_srun(environment):
        return _from_slurm(environment)
    for rank, _ in _MPI_VARIABLES:
        if rank in environment:
            return _from_mpi(environment, environment[rank])
    return Place(
        rank=0,
        world=1,
        local_rank=0,
        master_addr="127.0.0.1",
        master_port=_integer(environment, "MASTER_PORT", 0) or free_port(),
        launcher="single",
    )


def is_main_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is rank 0 according to the launcher's variables. Rank 0 prints for all ranks.

    If the rank variable is not a number, return True, so that this process prints the error about it.
    """
    names = ("RANK", *(rank for rank, _ in _MPI_VARIABLES), "SLURM_PROCID")
    rank = next((environment[name] for name in names if name in environment), "0")
    return not rank.isdecimal() or int(rank) == 0


# Seconds that other ranks wait before they exit if the error came before torch.distributed was initialised. Rank 0
# needs them to print the error: at the first exit the launcher kills all other ranks.
LAST_WORD = 1.0


def run_rank(main: Callable[[], None]) -> NoReturn:
    """Run the `main` function of a launch script on this rank, then exit the process.

    The exit status is 0 after success, 2 after a UserError (printed by rank 0) and 1 after a bug in moe_dist.
    docs/resuming.md, "Stopping and starting again", has a table of the exit statuses and the matching
    contents of RUN/status.json.

    After an error, other ranks may still wait in a collective, and Python's clean-up would wait for them. Therefore
    this rank exits without the clean-up. The launcher sees the exit at once and kills the other ranks.
    """
    gc.freeze()  # imported objects stay: do not scan them during the run and, for two seconds, at exit
    code = 0
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception as error:
        sentence = as_user_error(error)
        code = 1 if sentence is None else 2
        if sentence is None and not isinstance(error, PeerError):
            traceback.print_exc()
        elif is_main_process():  # every rank has the same sentence: print it once
            print(f"error: {sentence or error}", file=sys.stderr, flush=True)
        elif not dist.is_initialized():
            time.sleep(LAST_WORD)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


def free_port() -> int:
    """Return a TCP port that is free on this machine at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: `n[07-09,12],m3` -> `n07`."""
    first = re.split(r",(?![^\[]*\])", nodelist, maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _from_environment(environment: Mapping[str, str]) -> Place:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(f"the environment sets RANK or WORLD_SIZE but not {', '.join(missing)}")
    rank, world = _integer(environment, "RANK"), _integer(environment, "WORLD_SIZE")
    if rank >= world:
        raise UserError(f"the environment sets RANK={rank}, but WORLD_SIZE={world} ranks are numbered from 0")
    return Place(
        rank=rank,
        world=world,
        local_rank=_integer(environment, "LOCAL_RANK", rank),
        master_addr=environment["MASTER_ADDR"],
        master_port=_integer(environment, "MASTER_PORT"),
        launcher="environment",
    )


def _integer(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    """Read an environment variable as an integer; return the default if the variable is unset or empty.

    Raises UserError if the value is not a non-negative integer.
    """
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"the environment sets {name}={text}, which is not a non-negative integer")
    return int(text)


def _started_by_srun(environment: Mapping[str, str]) -> bool:
    """Return whether srun started this process, so that Slurm's variables give its rank.

    A process that mpiexec started may have inherited Slurm's variables from the surrounding job step. If Slurm's
    variables differ from MPI's, return False, because then MPI's variables give the rank.
    """
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return False
    for rank, world in _MPI_VARIABLES:
        if environment.get(rank, environment["SLURM_PROCID"]) != environment["SLURM_PROCID"]:
            return False
        if environment.get(world, environment["SLURM_STEP_NUM_TASKS"]) != environment["SLURM_STEP_NUM_TASKS"]:
            return False
    return True


def _from_slurm(environment: Mapping[str, str]) -> Place:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    # Every task must choose the same port without communication, so derive it from the numbers of the job and step.
    step = 1009 * _integer(environment, "SLURM_JOB_ID") + _integer(environment, "SLURM_STEP_ID")
    return Place(
        rank=_integer(environment, "SLURM_PROCID"),
        world=_integer(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(environment, "SLURM_LOCALID"),
        master_addr=environment.get("MASTER_ADDR") or first_host(nodes),
        master_port=_integer(environment, "MASTER_PORT", 20000 + step % 10000),
        launcher="slurm",
    )


def _from_mpi(environment: Mapping[str, str], rank: str) -> Place:
    MPI = start_mpi(rank)
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    meeting = None
    if world.rank == 0:
        one_machine = local.size == world.size
        address = environment.get("MASTER_ADDR") or ("127.0.0.1" if one_machine else socket.gethostname())
        meeting = address, _integer(environment, "MASTER_PORT") or free_port()
    master_addr, master_port = world.bcast(meeting, root=0)
    return Place(
        rank=world.rank,
        world=world.size,
        local_rank=local.rank,
        master_addr=master_addr,
        master_port=master_port,
        launcher="mpi",
    )


def host_name() -> str:
    """Return the name of this node. An operator can use it to drain the node.

    Under Slurm, this is Slurm's name for the node. Otherwise, it is the host name.
    """
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
