"""One GPU for each rank: ranks that share one are reported in one sentence, before NCCL refuses them."""

from __future__ import annotations

import json
import os
from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from moe_dist.core.errors import UserError
from moe_dist.parallel.discovery import Place, host_name


def check_gpus(place: Place, device: torch.device) -> dist.Store | None:
    """Raise UserError on every rank if two of them are on one GPU. Collective, after Place.export.

    Ranks may share a GPU on purpose if each of them sets its own NCCL_HOSTID, by which NCCL tells hosts apart.

    NCCL meets the ranks while torch.distributed is initialised, so they meet here before that, in the store of the same
    address and port. Keep the store that is returned until the initialisation is done: it is used again.
    """
    gpu = gpu_of(device)
    if gpu is None or place.world == 1:
        return None
    store = next(iter(rendezvous("env://")))[0]
    ranks, mine = [str(rank) for rank in range(place.world)], dist.PrefixStore("gpus", store)
    mine.set(str(place.rank), json.dumps([host_name(), gpu, os.environ.get("NCCL_HOSTID", "")]))
    problem = shared_gpu([tuple(json.loads(seat)) for seat in mine.multi_get(ranks)])
    if problem is not None:
        mine.set(f"{place.rank} knows", "")
        if place.rank == 0:  # it holds the store: the others must have read it
            mine.wait([f"{rank} knows" for rank in ranks])
        raise UserError(problem)
    return store


def shared_gpu(seats: list[tuple[str, str, str]]) -> str | None:
    """Return a sentence if two ranks are on one GPU. seats: host, GPU and NCCL_HOSTID of each rank.

    NCCL takes ranks for ranks of one host if their NCCL_HOSTID is the same, or, without it, their host name.
    """
    taken = Counter((gpu, hostid or host) for host, gpu, hostid in seats)
    host = next((host for host, gpu, hostid in seats if taken[gpu, hostid or host] > 1), None)
    if host is None:
        return None
    ranks = [rank for rank, seat in enumerate(seats) if seat[0] == host]
    gpus = len({seat[1] for seat in seats if seat[0] == host})
    return (
        f"{len(ranks)} ranks on {host} ({', '.join(map(str, ranks))}) have {gpus} GPU{'s' * (gpus > 1)} between them, "
        f"but each rank needs its own: start {gpus} there (make train RANKS={gpus}, deepspeed --num_gpus {gpus}, "
        f"Slurm's --ntasks-per-node={gpus}); to share a GPU on purpose, give each rank its own NCCL_HOSTID"
    )


def gpu_of(device: torch.device) -> str | None:
    """Return the UUID of a CUDA device; None for another device."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
