"""The names of everything a run measures: one table, which metrics.jsonl, TensorBoard and W&B follow.

{layer} stands for a layer's number, {modality} for text or image, {domain} for a name that the instructions bring. All
losses are in nats per predicted token. The moe/ keys and model_flops count all micro-batches of the step, on all
ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from moe_dist.core.batch import MODALITIES

KEYS = {
    "step": "optimizer steps done",
    "tokens": "predictions trained on so far, over all ranks",
    "causal": "false: routing looked at later tokens (expert choice), so no loss of this line is a likelihood",
    "loss": "training loss of the step",
    "loss/{modality}": "the same, of the predictions whose target has this modality",
    "loss/load_balance": "load-balancing loss before its weight, mean over layers; top_k at balance",
    "loss/causal_routers": "binary cross-entropy of auxiliary routers, before its weight, mean over layers",
    "loss/manifold": "RoMA's manifold term before its weight, mean over the samples that have neighbours",
    "manifold/coverage": "share of the step's samples that have neighbours",
    "loss/pooled_balance": "LLaVA-MoLE's balance loss before its weight; top_k / columns at balance",
    "loss/router_z": "router z-loss before its weight, mean over layers",
    "eval/loss": "held-out loss",
    "eval/loss/{modality}": "the same, per modality of the target",
    "eval/loss/domain/{domain}": "the same, per domain of the instruction",
    "eval/causal/loss": "held-out loss with auxiliary routers in place of expert choice and depth: a likelihood",
    "eval/causal/loss/{modality}": "the same, per modality of the target",
    "eval/causal/loss/domain/{domain}": "the same, per domain of the instruction",
    "eval/image_to_text": "held-out loss of captions and their ends where the image comes first",
    "eval/text_to_image": "held-out loss of image codes where the caption comes first",
    "eval/causal/image_to_text": "with auxiliary routers",
    "eval/causal/text_to_image": "with auxiliary routers",
    "eval/caption_gain": "nats per image code by which an image's own caption before it helps, against another caption",
    "eval/caption_gain/low": "lower end of its 95 % interval, over captions",
    "eval/caption_gain/high": "upper end",
    "eval/caption_gain/captions": "number of captions",
    "eval/causal/caption_gain": "the same with auxiliary routers",
    "eval/causal/caption_gain/low": "lower end of its 95 % interval, over captions",
    "eval/causal/caption_gain/high": "upper end",
    "eval/causal/caption_gain/captions": "number of captions",
    "eval/shuffled/loss": "held-out loss with the captions shuffled against the images",
    "eval/shuffled/loss/{modality}": "the same, per modality of the target",
    "eval/bigram": "held-out loss of the smoothed bigram baseline",
    "eval/bigram/{modality}": "the same, per modality of the target",
    "lr": "learning rate of the step",
    "grad_norm": "global gradient norm before clipping",
    "skipped_steps": "steps skipped so far because of a non-finite loss or gradient",
    "step_seconds": "wall-clock seconds of the step, waiting for data included",
    "data_wait_seconds": "seconds of the step spent waiting for data",
    "checkpoint_stall_seconds": "seconds that training stood still for the saves since the line before, if any",
    "tokens_per_second": "predictions trained on a second, over all ranks",
    "model_flops": "floating-point operations of the model in the step, forward and backward, over all ranks",
    "model_flops_per_second": "floating-point operations of the model a second, over all ranks",
    "moe/{layer}/utilization": "list by expert: load over fair share (see metrics/routing_metrics.py)",
    "moe/{layer}/experts_per_token/{modality}": "mean number of experts that a valid token reaches",
    "moe/{layer}/unrouted_fraction/{modality}": "share of the valid tokens that no expert takes",
    "moe/{layer}/dropped_fraction": "list by expert: share of its assignments that found it full; only where any was",
    "moe/{layer}/domain_share/{domain}": "list by expert: its share of the assignments of the domain's tokens",
    "moe/{layer}/admitted/{modality}": "share of the valid tokens on which mixture-of-depths lets the layer work",
    "moe/{layer}/auxiliary_accuracy/{modality}": "share of auxiliary routers' decisions about experts that are right",
    "moe/{layer}/auxiliary_precision/{modality}": "share of the experts that they choose which the main router chose",
    "moe/{layer}/auxiliary_recall/{modality}": "share of the experts that the main router chose which they choose",
    "moe/{layer}/depth_accuracy": "the same three of the auxiliary router for mixture-of-depths",
    "moe/{layer}/depth_precision": "of the tokens that it admits",
    "moe/{layer}/depth_recall": "of the tokens that the main router admitted",
    "moe/experts_per_token": "mean number of experts that a valid token reaches, over all layers (null experts: none)",
    "moe/flops_saved": "share of the FLOPs saved against every token taking the router's reference_top_k experts",
    "moe/rank_imbalance": "rows of the busiest expert-parallel rank over the mean of its group, in the worst layer",
}

_BLANKS = {"{layer}": r"\d+", "{modality}": "|".join(MODALITIES), "{domain}": ".+"}
_PATTERN = re.compile("|".join(re.sub(r"\{\w+\}", lambda blank: f"(?:{_BLANKS[blank[0]]})", key) for key in KEYS))


def undeclared(names: Iterable[str]) -> list[str]:
    """Those of the names that the table does not hold."""
    return [name for name in names if not _PATTERN.fullmatch(name)]
