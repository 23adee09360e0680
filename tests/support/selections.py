"""Selections of a run, and runs that follow the selections of another.

Layouts and processors round differently, which moves a logit by about 1e-7. If the margin of a selection is smaller (a
near-tie), rounding may reverse it, and the two runs then differ by far more than rounding although both are correct. A
test that compares layouts must not depend on that. So the compared run selects by the logits of its reference, and
keeps its own logits. `deviation` compares the two: a selection is replaced only if the logits agree to the test's
tolerance, and a fault that moves them further fails the test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from moe_dist.core.batch import TokenInfo
from moe_dist.model.moe import deepseek_router, expert_choice, token_choice
from moe_dist.model.moe import depth_router as depth
from moe_dist.model.moe.router import selection_keys

# Largest difference of a logit due to rounding, after a few steps: under half a cell of the grid of selection_keys.
LOGITS = 3e-5
# Nats by which a decision that falls differently may move the mean loss of a small run (seen: up to 7e-4). Runs under a
# launcher cannot follow each other, so they are compared to this; a rank that takes other data moves it further.
ONE_DECISION = 2e-3
Selections = dict[tuple[int, int], tuple[Tensor, Tensor]]  # (step, key of the router): token ids in order, their logits


class Watch:
    """Keeps the logits of every selection. With `follow` it selects by those of another run. Set `step` before each
    step.
    """

    def __init__(self, follow: Selections | None = None) -> None:
        self.step, self.follow = 0, follow
        self._seen: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def keys(self, logits_VC: Tensor, info: TokenInfo, key: int, scope: str = "group") -> Tensor:
        """Replace moe_dist.model.moe.router.selection_keys."""
        token_id_V = info.token_id_T.index_select(0, info.competing(scope)[0])
        self._seen.setdefault((self.step, key), []).append((token_id_V, logits_VC.detach()))
        if self.follow is not None and (self.step, key) in self.follow:
            logits_VC = _logits_of(token_id_V, *self.follow[self.step, key], own_VC=logits_VC.detach())
        return selection_keys(logits_VC, info, key, scope)

    @property
    def seen(self) -> Selections:
        return {place: _in_order(pieces) for place, pieces in self._seen.items()}


@contextmanager
def watching(follow: Selections | None = None) -> Iterator[Watch]:
    """Watch every router of this process."""
    watch = Watch(follow)
    with pytest.MonkeyPatch.context() as patch:
        for module in (token_choice, deepseek_router, expert_choice, depth):
            patch.setattr(module, "selection_keys", watch.keys)
        yield watch


def unite(of_ranks: Iterable[Selections]) -> Selections:
    """Unite the selections of all ranks, over the tokens of all."""
    pieces: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for seen in of_ranks:
        for place, piece in seen.items():
            pieces.setdefault(place, []).append(piece)
    return {place: _in_order(found) for place, found in pieces.items()}


def deviation(mine: Selections, reference: Selections) -> float:
    """Return the largest difference of a logit over the steps of `mine`; inf if the tokens selected from differ."""
    assert mine, "no selection was seen"
    largest = 0.0
    for place, (token_id_V, logits_VC) in mine.items():
        if place not in reference or not torch.equal(token_id_V, reference[place][0]):
            return math.inf
        difference = float((logits_VC - reference[place][1]).abs().max())
        largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest


def _in_order(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sort by token id. If recomputation has selected from a token twice, keep the first."""
    token_id_V, logits_VC = (torch.cat(column) for column in zip(*pieces, strict=True))
    token_id_V, order_V = token_id_V.sort(stable=True)
    first_V = torch.ones_like(token_id_V, dtype=torch.bool)
    first_V[1:] = token_id_V[1:] != token_id_V[:-1]
    return token_id_V[first_V], logits_VC.index_select(0, order_V[first_V])


def _logits_of(token_id_V: Tensor, known_K: Tensor, logits_KC: Tensor, *, own_VC: Tensor) -> Tensor:
    """Return the known logits of these tokens, and own_VC for unknown ones (a fault, which `deviation` reports)."""
    index_V = torch.searchsorted(known_K, token_id_V).clamp(max=len(known_K) - 1)
    is_known_V = known_K.index_select(0, index_V) == token_id_V
    return torch.where(is_known_V[:, None], logits_KC.index_select(0, index_V), own_VC)
