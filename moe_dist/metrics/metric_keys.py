"""The table of all metric keys. The keys are the same in metrics.jsonl, TensorBoard and W&B.

In the keys, {layer} stands for a layer's number, {modality} for text or image, {domain} for the name of an
instruction domain, {task} for the name of a task or group of lm_eval, and {metric} for the name of one of its metrics.
All losses are in nats per predicted token. The moe/ keys and model_flops cover all micro-batches of the step on all
ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from moe_dist.core.batch import MODALITIES

KEYS = {
    "step": "optimizer steps done",
    "tokens": "predictions trained on so far, over all ranks",
    "causal": "false if routing saw later tokens (expert choice), so that no loss of this line is a likelihood",
    "loss": "training loss of the step",
    "loss/{modality}": "the same, over the predictions whose target has this modality",
    "loss/load_balance": "load-balancing loss before its weight, mean over layers; top_k at balance",
    "loss/causal_routers": "binary cross-entropy of auxiliary routers, before its weight, mean over layers",
    "loss/manifold": "RoMA's manifold term before its weight, mean over the samples that have neighbours",
    "manifold/coverage": "share of the step's samples that have neighbours",
    "loss/pooled_balance": "LLaVA-MoLE's balance loss before its weight; top_k / columns at balance",
    "loss/router_z": "router z-loss before its weight, mean over layers",
    "eval/loss": "held-out loss",
    "eval/loss/{modality}": "the same, per modality of the target",
    "eval/loss/domain/{domain}": "the same, per domain of the instruction",
    "eval/loss/low": "lower end of the 95 % confidence interval of eval/loss over documents",
    "eval/loss/high": "upper end",
    "eval/accuracy": "fraction of the held-out predictions whose target is the most likely token",
    "eval/accuracy/low": "lower end of its 95 % confidence interval over documents",
    "eval/accuracy/high": "upper end",
    "eval/tasks/{task}/{metric}": "a metric of lm_eval on a task or group (metrics of another filter: METRIC/FILTER)",
    "eval/tasks/{task}/{metric}/low": "lower end of its 95 % confidence interval over the task's documents",
    "eval/tasks/{task}/{metric}/high": "upper end",
    "eval/causal/loss": "held-out loss (a likelihood) with auxiliary routers replacing expert choice and "
    "mixture-of-depths",
    "eval/causal/loss/{modality}": "the same, per modality of the target",
    "eval/causal/loss/domain/{domain}": "the same, per domain of the instruction",
    **{
        f"eval/{routing}/{key}": f"as eval/{key}, for eval/{routing}/loss"
        for routing in ("causal", "shuffled")
        for key in ("loss/low", "loss/high", "accuracy", "accuracy/low", "accuracy/high")
    },
    "eval/image_to_text": "held-out loss of captions and their end tokens that follow their image",
    "eval/text_to_image": "held-out loss of image codes that follow their caption",
    "eval/causal/image_to_text": "the same with auxiliary routers",
    "eval/causal/text_to_image": "the same with auxiliary routers",
    "eval/caption_gain": "nats per image code that the image's own caption saves, compared with another caption",
    "eval/caption_gain/low": "lower end of its 95 % confidence interval over captions",
    "eval/caption_gain/high": "upper end",
    "eval/caption_gain/captions": "number of captions",
    "eval/causal/caption_gain": "the same with auxiliary routers",
    "eval/causal/caption_gain/low": "lower end of its 95 % confidence interval over captions",
    "eval/causal/caption_gain/high": "upper end",
    "eval/causal/caption_gain/captions": "number of captions",
    "eval/shuffled/loss": "held-out loss with captions shuffled among the images",
    "eval/shuffled/loss/{modality}": "the same, per modality of the target",
    "eval/bigram": "held-out loss of the smoothed bigram baseline",
    "eval/bigram/{modality}": "the same, per modality of the target",
    "lr": "learning rate of the step",
    "grad_norm": "global gradient norm before clipping",
    "skipped_steps": "steps skipped so far because of a non-finite loss or gradient",
    "step_seconds": "wall-clock seconds of the step, including waiting for data",
    "data_wait_seconds": "seconds of the step spent waiting for data",
    "checkpoint_stall_seconds": "seconds that training waited for saves since the previous line; absent without a save",
    "tokens_per_second": "predictions trained on per second, over all ranks",
    "model_flops": "floating-point operations of the model in the step, forward and backward, over all ranks",
    "model_flops_per_second": "floating-point operations of the model per second, over all ranks",
    "moe/{layer}/utilization": "list by expert: load over fair share (see metrics/routing_metrics.py)",
    "moe/{layer}/experts_per_token/{modality}": "mean number of experts per valid token",
    "moe/{layer}/unrouted_fraction/{modality}": "fraction of valid tokens that reach no expert",
    "moe/{layer}/dropped_fraction": "list by expert: fraction of its assignments dropped at capacity; absent if all 0",
    "moe/{layer}/domain_share/{domain}": "list by expert: its share of the assignments of the domain's tokens",
    "moe/{layer}/admitted/{modality}": "fraction of valid tokens that mixture-of-depths admits to the layer",
    "moe/{layer}/auxiliary_accuracy/{modality}": "fraction of auxiliary routers' decisions equal to the main router's",
    "moe/{layer}/auxiliary_precision/{modality}": "fraction of auxiliary routers' choices that the main router shares",
    "moe/{layer}/auxiliary_recall/{modality}": "fraction of the main router's choices that auxiliary routers share",
    "moe/{layer}/depth_accuracy": "auxiliary_accuracy for the auxiliary router of mixture-of-depths",
    "moe/{layer}/depth_precision": "fraction of the tokens it admits that the main router admitted",
    "moe/{layer}/depth_recall": "fraction of the tokens the main router admitted that it admits",
    "moe/experts_per_token": "mean number of experts per valid token, over all layers (null experts do not count)",
    "moe/flops_saved": "fraction of FLOPs saved compared with routing every token to the router's reference_top_k "
    "experts",
    "moe/rank_imbalance": "rows of the busiest expert-parallel rank over the mean of its group, in the worst layer",
}

_BLANKS = {"{layer}": r"\d+", "{modality}": "|".join(MODALITIES), "{domain}": ".+", "{task}": "[^/]+", "{metric}": ".+"}
_PATTERN = re.compile("|".join(re.sub(r"\{\w+\}", lambda blank: f"(?:{_BLANKS[blank[0]]})", key) for key in KEYS))


def undeclared(names: Iterable[str]) -> list[str]:
    """Return the names that are not in the table of keys."""
    return [name for name in names if not _PATTERN.fullmatch(name)]
