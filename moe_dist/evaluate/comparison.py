"""What a trained model has learnt, in numbers that can disappoint: its held-out loss beside two references.

A smoothed bigram model of the training split must be beaten, and the same held-out pairs with their captions shuffled
against their images must be harder, or the model does not use one modality to predict the other.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_dist.config import DataConfig
from moe_dist.data.heldout import ShuffledCaptions, heldout_batches
from moe_dist.data.packing import TokenStore
from moe_dist.data.vocabulary import Vocabulary
from moe_dist.evaluate.bigram import Bigram
from moe_dist.evaluate.captions import caption_gain
from moe_dist.evaluate.conditional import conditional_losses
from moe_dist.evaluate.perplexity import evaluate, mean_losses
from moe_dist.parallel.layout import Layout


def compare_with_references(
    forward: Callable,
    *,
    train: TokenStore,
    held_out: TokenStore,
    vocabulary: Vocabulary,
    data: DataConfig,
    layout: Layout,
    groups: int,
    batch_groups: int,
    causal_too: bool = False,
) -> dict[str, float]:
    """Held-out nats per token, under the keys of telemetry/keys.py. Collective.

    forward: Batch -> an output with logits_TV. groups: selection groups of the held-out split that are looked at.
    causal_too: also with causal routing (eval/causal/...), of a model that has it beside that of training.
    """

    def batches(store: TokenStore):
        return heldout_batches(
            store, vocabulary, data, groups=groups, dp_rank=layout.rank, dp=layout.world, batch_groups=batch_groups
        )

    def of_model(forward: Callable) -> dict[str, float]:
        return evaluate(forward, batches(held_out), layout, held_out.domains) | conditional_losses(
            forward, held_out, vocabulary, data, layout, groups=groups, batch_groups=batch_groups
        )

    model = of_model(forward)
    causal = of_model(lambda batch: forward(batch.causally())) if causal_too else {}
    shuffled = evaluate(forward, batches(ShuffledCaptions(held_out)), layout) if held_out.has_image.any() else {}
    gain = caption_gain(forward, held_out, vocabulary, data, layout, groups=groups, batch_groups=batch_groups)
    bigram = mean_losses(Bigram.fit(train, vocabulary, data).token_losses, batches(held_out), layout)
    return (
        model
        | gain
        | {key.replace("eval/", "eval/causal/"): value for key, value in causal.items()}
        | {key.replace("eval/", "eval/shuffled/"): value for key, value in shuffled.items()}
        | {key.replace("eval/loss", "eval/bigram"): value for key, value in bigram.items() if key != "eval/loss"}
    )
