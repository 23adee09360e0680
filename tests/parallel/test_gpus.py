"""Ranks that share a GPU stop with one sentence on every rank, on stand-ins for the devices."""

import os
import sys

import pytest
from deepspeed.accelerator import get_accelerator

from moe_dist.parallel import gpus
from moe_dist.parallel.discovery import free_port, run_rank
from moe_dist.training.deepspeed import init_distributed
from tests.support.distributed import FORK_SERVER


def _rank(rank, world, port, visible, own, hostids, path):
    """A rank that sees so many GPUs. own: it is the only one that sees them, as under srun --gpus-per-task."""
    sys.stderr = path.open("w")
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        SLURMD_NODENAME="n7",
    )
    if hostids:
        os.environ["NCCL_HOSTID"] = hostids[rank]
    get_accelerator().device_count = lambda: visible
    gpus.gpu_of = lambda device: f"GPU-{rank if own else os.environ['LOCAL_RANK']}"
    run_rank(init_distributed)


def start(folder, world, visible, own=False, hostids=()):
    """(exit status, what was printed) of every rank."""
    port, paths = free_port(), [folder / str(rank) for rank in range(world)]
    ranks = [
        FORK_SERVER.Process(target=_rank, args=(rank, world, port, visible, own, hostids, paths[rank]))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    return [(process.exitcode, path.read_text()) for process, path in zip(ranks, paths)]


@pytest.mark.parametrize(
    ("world", "visible", "hostids", "sentence"),
    [
        (2, 1, (), "2 ranks on n7 (0, 1) have 1 GPU between them, but each rank needs its own: start 1 there"),
        (3, 2, (), "3 ranks on n7 (0, 1, 2) have 2 GPUs between them, but each rank needs its own: start 2 there"),
        (2, 1, ("same", "same"), "give each rank its own NCCL_HOSTID"),
    ],
)
def test_more_ranks_than_gpus(world, visible, hostids, sentence, tmp_path):
    (code, said), *others = start(tmp_path, world, visible, hostids=hostids)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and sentence in said
    assert others == [(2, "")] * (world - 1)


@pytest.mark.parametrize(
    ("visible", "own", "hostids"),
    [(2, False, ()), (1, True, ()), (1, False, ("one", "two"))],
    ids=["a GPU each", "each sees its own only", "shared on purpose"],
)
def test_ranks_that_may_start(visible, own, hostids, tmp_path):
    assert start(tmp_path, 2, visible, own, hostids) == [(0, ""), (0, "")]
