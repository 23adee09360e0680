"""The decisions of a model's routers, and their margins, which measure how close each decision is to being reversed.

A decision states whether a column (an expert, a null expert, a block with mixture-of-depths) takes a given token. The
margin of a decision is the distance that the token's logit must move to reverse the decision (`selection_margins` in
model/moe/router.py). Two layouts make the same decisions as long as their rounding differences stay below the margins.

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
from moe_dist.core.routing_plan import Routing
from moe_dist.model.moe.deepseek_router import HIGHEST, LOWEST, DeepSeekV3Router
from moe_dist.model.moe.depth_router import DepthRouter
from moe_dist.model.moe.expert_choice import ExpertChoiceRouter
from moe_dist.model.moe.router import selection_keys, selection_margins
from moe_dist.model.moe.token_choice import TokenChoiceRouter


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """The decisions of one router in one forward pass, and the margins of these decisions.

    If a full expert drops a token, the token still counts as chosen.
    """

    router: str
    token_id_V: Tensor
    chosen_VC: Tensor  # bool
    margin_VC: Tensor  # float64; inf if the decision cannot change


@contextmanager
def watch_decisions(model: nn.Module) -> Iterator[list[Decisions]]:
    """Yield an empty list. Every forward pass in the body of the `with` statement appends its decisions to the list.

    If a block is recomputed in the backward pass, its decisions are appended twice.
    """
    found: list[Decisions] = []

    def note(name: str) -> Any:
        return lambda router, inputs, output: found.extend(_decisions(name, router, inputs[1], output[1]))

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


def _decisions(name: str, router: Any, info: TokenInfo, output: Any) -> Iterator[Decisions]:
    (routing,) = (output,) if isinstance(router, DepthRouter) else output.routings
    if isinstance(router, DeepSeekV3Router):
        yield from _biased_decisions(name, router, info, routing)
        return
    scope = router.settings.scope if isinstance(router, DepthRouter) else "group"
    token_id_V = info.token_id_T.index_select(0, routing.token_V)
    keys_VC = selection_keys(routing.logits_VC, info, router.key, scope)
    if isinstance(router, TokenChoiceRouter):  # the columns of a token compete
        margin_VC = selection_margins(routing.logits_VC.t(), keys_VC.t(), routing.chosen_VC.t()).t()
    else:
        _, sizes = info.competing(scope)
        pieces = zip(routing.logits_VC.split(sizes), keys_VC.split(sizes), routing.chosen_VC.split(sizes), strict=True)
        # In a group without tokens there is nothing to decide.
        margin_VC = torch.cat([selection_margins(*piece) if len(piece[0]) else piece[0].double() for piece in pieces])
    yield Decisions(router=name, token_id_V=token_id_V, chosen_VC=routing.chosen_VC, margin_VC=margin_VC)


def _biased_decisions(name: str, router: DeepSeekV3Router, info: TokenInfo, routing: Routing) -> Iterator[Decisions]:
    """Yield the decisions of a DeepSeek-V3 router: first those about groups of experts, then those about experts.

    The decisions about groups are reported under the router name NAME.groups. If tokens may use all groups, there are
    no decisions about groups. A group's margin is measured on the sum of its two highest scores. An expert's margin is
    measured on its biased score; it is inf if the expert is outside the chosen groups.
    """
    scores_VE, chosen_VE = router.biased_scores(routing.logits_VC), routing.chosen_VC
    keys_VE = selection_keys(scores_VE, info, router.key)
    token_id_V = info.token_id_T.index_select(0, routing.token_V)
    open_VE = torch.ones_like(chosen_VE)
    if router.settings.top_groups < router.settings.groups:
        sums_VG = router.group_scores(scores_VE)
        keys_VG = selection_keys(sums_VG, info, router.group_key)
        used_VG = chosen_VE.unflatten(1, (router.settings.groups, -1)).any(dim=2)  # taken, whatever the reason
        taken_VG = router.highest_groups(keys_VG.masked_fill(used_VG, HIGHEST))
        margin_VG = selection_margins(sums_VG.t(), keys_VG.t(), taken_VG.t()).t()
        yield Decisions(router=f"{name}.groups", token_id_V=token_id_V, chosen_VC=taken_VG, margin_VC=margin_VG)
        open_VE = router.of_experts(taken_VG)
    keys_VE = keys_VE.masked_fill(~open_VE, LOWEST)
    margin_VE = selection_margins(scores_VE.t(), keys_VE.t(), chosen_VE.t()).t().masked_fill(~open_VE, torch.inf)
    yield Decisions(router=name, token_id_V=token_id_V, chosen_VC=chosen_VE, margin_VC=margin_VE)
