"""slurm/devcluster.sh, in its own folder and in addition to the cluster of the other tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import DEVCLUSTER, MISSING, SBIN

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: see docs/slurm.md")


@pytest.fixture
def folder():
    """Make a folder with a short path, because socket paths in it have a length limit."""
    with tempfile.TemporaryDirectory(prefix="devcluster-", dir="/tmp") as folder:
        yield Path(folder) / "state"


@pytest.fixture
def dev(folder):
    """Yield a function that runs a command and returns (exit status, output). Finally, take the cluster down."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment |= {"PATH": SBIN, "DEVCLUSTER_DIR": str(folder)}

    def run(*command, env=()):
        done = subprocess.run(
            command,
            env=environment | dict(env),
            text=True,
            timeout=120,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout

    yield run
    assert run(DEVCLUSTER, "down") == (0, "")


def exports(dev):
    return dict(re.findall(r"(\w+)='([^']*)'", dev(DEVCLUSTER, "env")[1]))


def daemons(name):
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if str(name) in line]


def test_up_use_lose_a_node_and_down(dev, folder):
    assert dev(DEVCLUSTER, "status") == (1, "down\n")
    assert dev(DEVCLUSTER, "up", "3")[0] == 0
    variables = exports(dev)
    srun = ("srun", "--time=1", "-N3", "--gpus-per-node=2", "bash", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES")
    status, output = dev(*srun, env=variables)
    assert status == 0 and sorted(output.splitlines()) == [f"127.0.1.{n} 0,1" for n in (1, 2, 3)]

    sleep = f"sleep 6{os.getpid()}"  # unique, to find its process
    job = ("sbatch", "--time=2", "-w127.0.1.2", "--no-requeue", "--output=/dev/null", f"--wrap=exec {sleep}")
    assert dev(*job, env=variables)[0] == 0
    end = time.monotonic() + 30
    while not daemons(sleep):
        assert time.monotonic() < end, dev("scontrol", "show", "job", env=variables)[1]
        time.sleep(0.1)
    assert dev(DEVCLUSTER, "kill-node", "2")[0] == 0
    assert not daemons(sleep), "the task died with its node"
    assert dev("srun", "--time=1", "-N2", "-w127.0.1.[1,3]", "true", env=variables)[0] == 0, "the others live on"
    assert dev(DEVCLUSTER, "up", "3")[0] == 0, "the dead node comes back"
    assert dev(*srun, env=variables)[0] == 0
    assert "127.0.1.3" in dev(DEVCLUSTER, "status")[1]
    assert dev(DEVCLUSTER, "down") == (0, "")
    assert not daemons(folder) and not folder.exists()


def test_what_a_killed_cluster_has_left_is_not_in_the_way(dev, folder):
    assert dev(DEVCLUSTER, "up", "1")[0] == 0
    os.kill(int((folder / "slurmctld.pid").read_text()), signal.SIGKILL)
    assert dev(DEVCLUSTER, "up", "1")[0] == 0
    assert dev("srun", "--time=1", "true", env=exports(dev))[0] == 0


def test_a_folder_with_a_long_name_is_refused(dev, folder):
    status, output = dev(DEVCLUSTER, "up", "1", env={"DEVCLUSTER_DIR": f"{folder}/{'long' * 20}"})
    assert status == 1 and "is longer than 55 characters" in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("up",), "up needs the number of nodes"),
        (("up", "two"), "up needs the number of nodes"),
        (("env",), "is down"),
        (("kill-node", "1"), "is down"),
        ((), "slurm/devcluster.sh kill-node N"),
    ],
)
def test_a_wrong_command_is_told(dev, arguments, sentence):
    status, output = dev(DEVCLUSTER, *arguments)
    assert status != 0 and sentence in output
