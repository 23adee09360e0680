"""Starts the tools of launch/ as a user does, under a launcher or as bare ranks without one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support import ROOT

BIN = Path(sys.executable).parent
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MPIEXEC = [str(BIN / "mpiexec"), "-n", "2", sys.executable]
ALONE = [sys.executable]
MOMA = "configs/moma_quickstart.yaml"
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launch(
    launcher: Sequence[str],
    overrides: Sequence[str],
    *,
    config: str | Path = MOMA,
    threads: int = 1,
    variables: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run launch/train.py and wait until it ends."""
    arguments = ["--config", str(config), *overrides]
    return launch_tool(launcher, "train.py", arguments, threads=threads, variables=variables)


def launch_tool(
    launcher: Sequence[str],
    tool: str,
    arguments: Sequence[str],
    *,
    threads: int = 1,
    variables: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run launch/TOOL and wait until it ends."""
    if launcher is DEEPSPEED:
        launcher = [*DEEPSPEED, str(20000 + os.getpid() % 20000)]
    own = environment() | {"OMP_NUM_THREADS": str(threads)} | (variables or {})
    command = [*launcher, f"launch/{tool}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=400)


def start(launcher: Sequence[str], overrides: Sequence[str]) -> subprocess.Popen:
    """Start launch/train.py and do not wait; the returned process has its output. The caller gives DeepSpeed a port."""
    return subprocess.Popen(
        [*launcher, "launch/train.py", "--config", MOMA, *overrides],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def bare_ranks(
    overrides: Sequence[str],
    *,
    config: str | Path = MOMA,
    world: int = 2,
    variables: dict[str, str] | None = None,
    prepare_rank_0: Callable[[], None] | None = None,
) -> list[tuple[int, str]]:
    """Return (exit status, output) of every rank. No launcher ends a rank because another has failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    command = [sys.executable, "launch/train.py", "--config", str(config), *overrides]
    processes = []
    for rank in range(world):
        place = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment() | place | (variables or {}),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                preexec_fn=None if rank else prepare_rank_0,
            )
        )
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
        return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def signals_at(*rules: str) -> dict[str, str]:
    """Return variables that send signals to ranks at exact moments, "rank:SIGNAME:function:call" (see signals_at/)."""
    return {"PYTHONPATH": f"{ROOT / 'tests' / 'support' / 'signals_at'}:{ROOT}", "SIGNALS": ",".join(rules)}


def environment() -> dict[str, str]:
    """Return this process's environment without its rank variables, set up to import this package."""
    inherited = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
