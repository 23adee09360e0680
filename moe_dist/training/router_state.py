"""Updates of the state that routers keep between optimizer steps, based on each expert's load in the global batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.core.routing_plan import RoutingRecord
from moe_dist.model.moe.moe_layer import routers
from moe_dist.model.moe.router import StatefulRouter


class RouterStates:
    """The stateful routers of a model, and the loads of each router's experts in the current step.

    After the step, each router updates its state from the loads of its experts. The loads stay on the device.
    """

    def __init__(self, model: nn.Module) -> None:
        stateful = [cast(StatefulRouter, router) for router in routers(model) if router.has_state]
        self._routers = {router.layer: router for router in stateful}
        self._loads: dict[int, Tensor] = {}

    def start_step(self) -> None:
        """Reset the loads. A step that did not finish may have left loads behind."""
        self._loads = {}

    def add(self, records: Iterable[RoutingRecord]) -> None:
        """Add the loads of one micro-batch on this rank."""
        for record in records:
            if record.layer in self._routers:
                load_E = record.load_E
                self._loads[record.layer] = self._loads.get(record.layer, torch.zeros_like(load_E)) + load_E

    def after_step(self, group: dist.ProcessGroup | None) -> None:
        """Update every stateful router with the loads of its experts, summed over all ranks.

        Collective if the model has stateful routers. This takes one all-reduce and no host sync.
        """
        if not self._loads:
            return
        total = torch.cat(list(self._loads.values()))
        dist.all_reduce(total, group=group)
        for layer, load_E in zip(self._loads, total.split([len(load) for load in self._loads.values()]), strict=True):
            self._routers[layer].after_step(load_E)
