"""The names of everything a run measures: one table, which metrics.jsonl, TensorBoard and W&B follow.

{layer} stands for a layer's number, {modality} for text or image. All losses are in nats per predicted token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from moe_dist.batch import MODALITIES

KEYS = {
    "step": "optimizer steps done",
    "tokens": "predictions trained on so far, over all ranks",
    "causal": "false: routing looked at later tokens (expert choice), so no loss of this line is a likelihood",
    "loss": "training loss of the step",
    "loss/{modality}": "the same, of the predictions whose target has this modality",
    "eval/loss": "held-out loss",
    "eval/loss/{modality}": "the same, per modality of the target",
    "eval/shuffled/loss": "held-out loss with the captions shuffled against the images",
    "eval/shuffled/loss/{modality}": "the same, per modality of the target",
    "eval/bigram/{modality}": "held-out loss of the smoothed bigram baseline",
    "lr": "learning rate of the step",
    "grad_norm": "global gradient norm before clipping",
    "skipped_steps": "steps skipped so far because of a non-finite loss or gradient",
    "step_seconds": "wall-clock seconds of the step, waiting for data included",
    "data_wait_seconds": "seconds of the step spent waiting for data",
    "tokens_per_second": "predictions trained on a second, over all ranks",
    "model_flops_per_second": "floating-point operations of the model a second, over all ranks",
    "moe/{layer}/utilization": "list by expert: load over fair share (see telemetry/routing.py)",
    "moe/{layer}/experts_per_token/{modality}": "mean number of experts that a valid token reaches",
    "moe/{layer}/unrouted_fraction/{modality}": "share of the valid tokens that no expert takes",
    "moe/rank_imbalance": "rows of the busiest expert-parallel rank over the mean of its group, in the worst layer",
}

_BLANKS = {"{layer}": r"\d+", "{modality}": "|".join(MODALITIES)}
_PATTERN = re.compile("|".join(re.sub(r"\{\w+\}", lambda blank: f"(?:{_BLANKS[blank[0]]})", key) for key in KEYS))


def undeclared(names: Iterable[str]) -> list[str]:
    """Those of the names that the table does not hold."""
    return [name for name in names if not _PATTERN.fullmatch(name)]
