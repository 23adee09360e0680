"""Checks before training: all ranks run the same software and recipe, and data sent between them arrives unchanged.

A rank that differs from the others in a package, in the code, in the recipe or in its number of devices would train a
different model or hang in the first collective. These checks find such a rank before training and name its host. They
also measure the network's speed.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.config.recipe import Config
from moe_dist.core.errors import UserError
from moe_dist.parallel.agreement import gather_objects
from moe_dist.parallel.discovery import host_name

PACKAGES = ("torch", "deepspeed", "megatron-core", "webdataset", "sentencepiece", "numpy")
SOURCE = Path(__file__).parents[1]
SENT_BYTES = 2**22  # bytes that each rank sends in a round, over all receivers
ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One rank's host, hardware and software. All fields except `host` and `device` must be equal on all ranks."""

    host: str  # Slurm's name for it, if there is one
    device: str
    devices: int  # number of devices that the rank sees
    versions: dict[str, str]
    code: str  # digest of the package's source
    config: str  # digest of the resolved recipe

    def comparable(self) -> dict[str, Any]:
        same = {"number of devices": self.devices, "code revision": self.code, "resolved recipe": self.config}
        return {**self.versions, **same}


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The result of the checks before training: each rank's report and its sending rate in an all-to-all exchange."""

    ranks: tuple[RankReport, ...]
    bytes_per_second: tuple[float, ...]  # by rank; empty for a single rank

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """Return one line per host, and a last line with the common software and the slowest rank's network speed."""
        lines = []
        for host, group in groupby(enumerate(self.ranks), lambda item: item[1].host):
            ranks, reports = zip(*group)
            devices = ", ".join(sorted({report.device for report in reports}))
            named = f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
            lines.append(f"{host}: {named} on {devices}")
        first = self.ranks[0]
        common = ", ".join(f"{name} {found}" for name, found in first.versions.items())
        if self.bytes_per_second:
            slowest = min(range(len(self.ranks)), key=self.bytes_per_second.__getitem__)
            rate, host = self.bytes_per_second[slowest] / 1e9, self.ranks[slowest].host
            common += f"; all-to-all correct, {rate:.2f} GB/s on the slowest rank ({slowest} on {host})"
        return "\n".join([*lines, f"{common}; code {first.code}"])


def check_health(config: Config, device: torch.device) -> Health:
    """Compare the reports of all ranks, and test an all-to-all. Collective over the default group.

    Raises UserError naming the host of a rank that differs or receives wrong data.
    """
    ranks = tuple(gather_objects(report(config, device)))
    differences = compare(ranks)
    if differences:
        raise UserError(f"the ranks do not match: {'; '.join(differences)}")
    if len(ranks) == 1:
        return Health(ranks=ranks, bytes_per_second=())
    answers = gather_objects(exchange(device))
    broken = [
        f"rank {rank} on {ranks[rank].host} received other values than rank {sender} on {ranks[sender].host} sent"
        for rank, (_, senders) in enumerate(answers)
        for sender in senders
    ]
    if broken:
        raise UserError(f"the network between the ranks cannot be trusted: {'; '.join(broken)}")
    return Health(ranks=ranks, bytes_per_second=tuple(rate for rate, _ in answers))


def report(config: Config, device: torch.device) -> RankReport:
    """Return a report on this rank: its host, hardware and software."""
    is_cuda = device.type == "cuda"
    name = f" {torch.cuda.get_device_name(device)}" if is_cuda else ""
    versions = {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}
    if is_cuda:
        versions |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return RankReport(
        host=host_name(),
        device=f"{device.type}{name}",
        devices=torch.get_device_module(device).device_count(),
        versions=versions,
        code=_digest(*(path.read_bytes() for path in sorted(SOURCE.rglob("*.py")))),
        config=_digest(config.model_dump_json().encode()),
    )


def compare(ranks: tuple[RankReport, ...]) -> list[str]:
    """Return one phrase for each difference between the ranks' reports.

    Each value of a report, such as a package's version, is compared with the most common value over all ranks. If
    several values are equally common, the one that the lowest rank reports is used.
    """
    differences = []
    for name in ranks[0].comparable():
        values = [rank.comparable().get(name) for rank in ranks]
        usual = Counter(values).most_common(1)[0][0]
        like = values.index(usual)
        differences += [
            f"{name} is {value} on {ranks[rank].host} (rank {rank}), but {usual} on {ranks[like].host} (rank {like})"
            for rank, value in enumerate(values)
            if value != usual
        ]
    return differences


def exchange(device: torch.device) -> tuple[float, list[int]]:
    """Send a block of known numbers to every rank, and check the blocks received from every rank. Collective.

    Return the bytes per second that this rank sent to other ranks, and the ranks whose blocks arrived with wrong
    numbers. The rate is from the fastest of several rounds, since the first round also opens the connections.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers = torch.arange(max(SENT_BYTES // 8 // world, 1), device=device)
    sent = torch.cat([numbers + rank * world + receiver for receiver in range(world)])
    received = torch.empty_like(sent)
    seconds, synchronize = float("inf"), torch.get_device_module(device).synchronize
    for _ in range(ROUNDS):
        received.zero_()
        synchronize()
        started = time.perf_counter()
        dist.all_to_all_single(received, sent)
        synchronize()
        seconds = min(seconds, time.perf_counter() - started)
    blocks = received.chunk(world)
    wrong = [sender for sender in range(world) if not torch.equal(blocks[sender], numbers + sender * world + rank)]
    return numbers.nbytes * (world - 1) / seconds, wrong


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)  # includes the build (+cu130), which the package's metadata may omit
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]
