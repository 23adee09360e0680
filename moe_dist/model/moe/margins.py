"""Decisions of a model's routers and their margins: how close each is to being made differently.

A decision is whether a column (an expert, a null expert, a block with mixture-of-depths) takes a token. Its margin is
how far the token's logit must move to reverse it (model/moe/router.py `selection_margins`). Two layouts make the same
decisions as long as their rounding stays below the margins.

Shape suffixes: V routed tokens, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.core.batch import TokenInfo
from moe_dist.model.moe.depth_router import DepthRouter
from moe_dist.model.moe.expert_choice import ExpertChoiceRouter
from moe_dist.model.moe.router import selection_keys, selection_margins
from moe_dist.model.moe.token_choice import TokenChoiceRouter


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Decisions of one router in one forward pass. Which tokens a full expert drops is not among them."""

    router: str
    token_id_V: Tensor
    chosen_VC: Tensor  # bool
    margin_VC: Tensor  # float64; inf where everything was taken


@contextmanager
def watch_decisions(model: nn.Module) -> Iterator[list[Decisions]]:
    """Collect the decisions of every forward pass, in order; a recomputed block decides twice."""
    found: list[Decisions] = []

    def note(name: str) -> Any:
        return lambda router, inputs, output: found.append(_decisions(name, router, inputs[1], output[1]))

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, TokenChoiceRouter | ExpertChoiceRouter | DepthRouter)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _decisions(name: str, router: Any, info: TokenInfo, output: Any) -> Decisions:
    (routing,) = (output,) if isinstance(router, DepthRouter) else output.routings
    scope = router.settings.scope if isinstance(router, DepthRouter) else "group"
    token_id_V = info.token_id_T.index_select(0, routing.token_V)
    keys_VC = selection_keys(routing.logits_VC, info, router.key, scope)
    if isinstance(router, TokenChoiceRouter):  # the columns of a token compete
        margin_VC = selection_margins(routing.logits_VC.t(), keys_VC.t(), routing.chosen_VC.t()).t()
    else:
        _, sizes = info.competing(scope)
        pieces = zip(routing.logits_VC.split(sizes), keys_VC.split(sizes), routing.chosen_VC.split(sizes), strict=True)
        # A group without a token has nothing to decide.
        margin_VC = torch.cat([selection_margins(*piece) if len(piece[0]) else piece[0].double() for piece in pieces])
    return Decisions(router=name, token_id_V=token_id_V, chosen_VC=routing.chosen_VC, margin_VC=margin_VC)
