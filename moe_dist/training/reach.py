"""A check that every trained parameter gets a gradient in the first steps of a run (train.reach_steps).

A parameter that no gradient reaches never trains, and without this check nobody would notice. It counts as reached
after one non-zero gradient on any rank. In a stacked parameter, the row of each expert is checked separately. The check
takes several steps, because LoRA's matrix A gets no gradient until its matrix B has changed from 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.core.errors import UserError
from moe_dist.core.expert_rows import expert_ids, row_name
from moe_dist.core.routing_plan import RoutingRecord
from moe_dist.core.step import ModelOutput
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.model.moe.moe_layer import MoELayer
from moe_dist.model.moe.router import planning_routers
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.layout import Layout

_ENOUGH = 2  # steps in which an expert or router must have had tokens: LoRA's A gets no gradient in the first of them


@dataclass(frozen=True, slots=True)
class Reached:
    """The outcome of the check.

    `not_tried` and `never` list what no gradient reached: parameters, or experts' rows of stacked parameters.
    """

    steps: int
    reached: int
    not_tried: tuple[str, ...]  # not reached, because their expert or modality had no token in nearly all of the steps
    never: tuple[str, ...]  # not reached for another reason

    def check(self) -> None:
        """Raise UserError naming the parameters that no gradient reached, if there are any."""
        if self.never:
            raise UserError(
                f"no gradient reached {_listed(self.never)} in {self.steps} steps, so the run would not train "
                f"{'it' if len(self.never) == 1 else 'them'}: freeze with `trainable` what shall not be trained, or "
                "change train.reach_steps (0: no check)"
            )

    def sentence(self) -> str:
        """Return a message about the parameters in `not_tried`, with the possible reasons."""
        return (
            f"{self.steps} steps: gradients reached {self.reached} trained tensors, but not {_listed(self.not_tried)}, "
            "whose experts or modalities had too few tokens, or whose router has one expert"
        )


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more


class _Routed:
    """An expert layer, and the positions of its experts and routers in the token counts of `Reach`."""

    def __init__(self, name: str, layer: MoELayer, offset: int):
        router = layer.get_submodule("router")
        names = {module: path for path, module in router.named_modules(prefix=f"{name}.router")}
        self.experts = f"{name}.experts."
        self.num_experts, self.offset = layer.router.num_experts, offset
        self.routers = {f"{names[planner]}.": planner for planner in planning_routers(router)}

    @property
    def size(self) -> int:
        return self.num_experts + len(self.routers)

    def place(self, name: str, row: int | None) -> int | None:
        """Return the index of a parameter's expert or router in the token counts of `Reach`.

        Returns None if the parameter belongs neither to an expert nor to a router of this layer.

        row: for a stacked parameter, the global id of the expert or slice.
        """
        if name.startswith(self.experts) and row is not None:
            return self.offset + row % self.num_experts
        found = [number for number, prefix in enumerate(self.routers) if name.startswith(prefix)]
        return self.offset + self.num_experts + found[0] if found else None

    def tokens(self, record: RoutingRecord) -> Tensor:
        """Return the number of tokens that each expert received, followed by the number that each router scored.

        For a router with a single column, the number is 0, because it has nothing to choose.
        """
        parts = zip(record.routings, self.routers.values(), strict=True)
        scored = [part.token_V.shape[0] if _can_choose(router) else 0 for part, router in parts]
        load_E = record.load_E
        return torch.cat([load_E, load_E.new_tensor(scored)])


def _can_choose(router: nn.Module) -> bool:
    return int(getattr(router.get_submodule("gate"), "columns", 2)) > 1


class Reach:
    """The check that gradients reach all trained parameters of a model. Hooks observe the gradients and the routing.

    The hooks are removed after the check. A step does not count if it was skipped or if its learning rate is 0, because
    such a step does not change the parameters.
    """

    def __init__(self, model: nn.Module, layout: Layout, steps: int):
        """Start the check of a model. steps: the number of steps to check. If it is 0, there is no check."""
        self._layout, self._steps, self._left = layout, steps, steps
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad} if steps else {}
        self._seen: dict[str, Tensor] = {}
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]
        self._layers: list[_Routed] = []
        for name, layer in layers:
            self._layers.append(_Routed(name, layer, sum(before.size for before in self._layers)))
        self._tokens = torch.zeros(sum(layer.size for layer in self._layers), dtype=torch.int64, device=layout.device)
        self._tries = torch.zeros_like(self._tokens)
        self._hooks: list[Any] = [p.register_hook(partial(self._see, name)) for name, p in self._trained.items()]
        if steps:
            self._hooks.append(model.register_forward_hook(self._count))

    def after_step(self, lr: float, folder: RunFolder, *, skipped: bool) -> None:
        """Record a step. After the last step of the check, report the outcome and write it to `folder`. Collective.

        Raises UserError on every rank if a parameter received no gradient in any of the steps. There is no error if the
        parameter's expert or router received too few tokens. Such parameters are only reported.

        lr: the learning rate of the step. skipped: True if the optimizer skipped the step.
        """
        if not self._left:
            return
        if self._tokens.numel():
            dist.all_reduce(self._tokens, group=self._layout.dp_group)
        if lr > 0 and not skipped:
            self._tries += self._tokens > 0
            self._left -= 1
        self._tokens = torch.zeros_like(self._tokens)
        if not self._left:
            self._report(self._finish(), folder)

    @raise_on_all_ranks()
    def _report(self, reached: Reached, folder: RunFolder) -> None:
        if self._layout.is_main:
            folder.write_reached(asdict(reached))
            if reached.not_tried:
                print(reached.sentence(), flush=True)
        reached.check()

    def _see(self, name: str, gradient: Tensor) -> None:
        nonzero = gradient.detach() != 0
        own = nonzero.flatten(1).any(1) if expert_ids(self._trained[name]) is not None else nonzero.any()
        self._seen[name] = own | self._seen[name] if name in self._seen else own

    def _count(self, model: nn.Module, inputs: object, output: ModelOutput) -> None:
        if model.training and torch.is_grad_enabled() and self._layers:
            pairs = zip(self._layers, output.records, strict=True)
            self._tokens = self._tokens + torch.cat([layer.tokens(record) for layer, record in pairs])

    def _finish(self) -> Reached:
        for hook in self._hooks:
            hook.remove()
        reached, tries = self._over_ranks(), self._tries.tolist()
        missing = [tensor for tensor, found in zip(self._tensors(), reached.tolist(), strict=True) if not found]
        names: dict[bool, list[str]] = {True: [], False: []}
        for name, row in missing:
            names[self._was_tried(name, row, tries)].append(name if row is None else row_name(name, row))
        return Reached(self._steps, int(reached.sum()), tuple(names[False]), tuple(names[True]))

    def _was_tried(self, name: str, row: int | None, tries: list[int]) -> bool:
        places = [place for layer in self._layers if (place := layer.place(name, row)) is not None]
        return all(tries[place] >= _ENOUGH for place in places)

    def _tensors(self) -> Iterator[tuple[str, int | None]]:
        """Yield (name, row) for the trained parameters of all ranks, in the same order on every rank.

        For a stacked parameter, there is one pair per expert or slice, and `row` is the global id. For other
        parameters, `row` is None.
        """
        for name, parameter in self._trained.items():
            ids = expert_ids(parameter)
            rows = [None] if ids is None else range(len(ids) * self._layout.expert)
            yield from ((name, row) for row in rows)

    def _over_ranks(self) -> Tensor:
        """Return which trained tensors a gradient has reached on any rank. Collective.

        The result has one bool for each pair that `_tensors` yields, in the same order.
        """
        found = {tensor: number for number, tensor in enumerate(self._tensors())}
        reached = torch.zeros(len(found), dtype=torch.int32, device=self._layout.device)
        for name, seen in self._seen.items():
            ids = expert_ids(self._trained[name])
            places = [found[name, row] for row in (ids if ids is not None else (None,))]
            reached[places] = seen.reshape(-1).to(reached)
        dist.all_reduce(reached, op=dist.ReduceOp.MAX, group=self._layout.dp_group)
        return reached > 0
