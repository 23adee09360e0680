"""A check that every rank has its own GPU. If ranks share a GPU, it raises a clear error before NCCL fails."""

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
    """Raise UserError on every rank if two ranks share a GPU. Collective: every rank calls it after Place.export.

    Ranks may share a GPU on purpose if each of them sets a different NCCL_HOSTID, because NCCL then treats them as
    different hosts.

    Call this function before torch.distributed is initialised, because NCCL connects the ranks during that
    initialisation. The check communicates through a store at the address and port that torch.distributed will use. Keep
    the returned store until torch.distributed is initialised, because torch.distributed reuses it. Returns None if
    there is no GPU or only one rank.
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
        if place.rank == 0:  # it hosts the store, so it must not exit before the others have read it
            mine.wait([f"{rank} knows" for rank in ranks])
        raise UserError(problem)
    return store


def shared_gpu(seats: list[tuple[str, str, str]]) -> str | None:
    """Return an error message if two ranks share a GPU, otherwise None. seats: each rank's (host, GPU, NCCL_HOSTID).

    NCCL considers two ranks to be on the same host if their NCCL_HOSTIDs are equal. For a rank that has not set
    NCCL_HOSTID, NCCL uses the host name.
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
    """Return the UUID of a CUDA device, or None for any other device."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
