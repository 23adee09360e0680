"""The parallel layout: process groups for data, expert and expert-data parallelism.

The number of ranks is `world`. The number of ranks that read their own data is `dp`, currently equal to `world`. The
`ep` ranks of an expert-parallel group together hold all experts. Each expert is held by `edp` = dp / ep ranks, one in
each group. Expert-parallel groups consist of consecutive ranks (0..ep-1, ep..2ep-1, ...), as in Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_dist.core.batch import CPU
from moe_dist.core.errors import UserError
from moe_dist.parallel.agreement import raise_on_all_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The parallel layout as seen from one rank. The groups are None if torch.distributed is not initialised."""

    rank: int = 0
    world: int = 1
    expert: int = 1
    device: torch.device = CPU
    ep_group: dist.ProcessGroup | None = None  # the ranks that together hold every expert
    edp_group: dist.ProcessGroup | None = None  # the ranks that hold the same experts
    dp_group: dist.ProcessGroup | None = None  # the ranks that read data of their own

    @property
    def dp(self) -> int:
        """The number of data-parallel ranks."""
        return self.world

    @property
    def dp_rank(self) -> int:
        return self.rank

    @property
    def ep_rank(self) -> int:
        return self.rank % self.expert

    @property
    def edp(self) -> int:
        return self.dp // self.expert

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def check_layout(*, world: int, expert: int) -> None:
    """Raise UserError if `parallel.expert` does not divide the number of ranks."""
    if expert < 1 or world % expert:
        raise UserError(f"parallel.expert={expert} does not divide the {world} ranks of this run")


def make_layout(*, expert: int, device: torch.device) -> Layout:
    """Create the process groups. Collective. Raises UserError if `expert` does not divide the number of ranks.

    If torch.distributed is not initialised, return the layout of a single process, without groups.
    """
    if not dist.is_initialized():
        check_layout(world=1, expert=expert)
        return Layout(device=device)
    world, rank = dist.get_world_size(), dist.get_rank()
    with raise_on_all_ranks():
        check_layout(world=world, expert=expert)
    ep_group, _ = dist.new_subgroups_by_enumeration(
        [list(range(start, start + expert)) for start in range(0, world, expert)]
    )
    edp_group, _ = dist.new_subgroups_by_enumeration([list(range(start, world, expert)) for start in range(expert)])
    return Layout(
        rank=rank,
        world=world,
        expert=expert,
        device=device,
        ep_group=ep_group,
        edp_group=edp_group,
        dp_group=dist.group.WORLD,
    )
