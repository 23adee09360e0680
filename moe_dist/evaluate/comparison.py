"""Comparison of a trained model's held-out loss with two references.

The first reference is the loss of a smoothed bigram model that is fitted on the training split. The trained model must
have a lower loss than the bigram model. The second reference is the trained model's own loss when captions are shuffled
among the images. This loss must be higher than the loss with the true captions; otherwise the model does not use one
modality to predict the other.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_dist.data.stream.held_out_batches import ShuffledCaptions
from moe_dist.data.stream.packing import DocumentStore
from moe_dist.evaluate.bigram import Bigram
from moe_dist.evaluate.captions import caption_gain
from moe_dist.evaluate.conditional import conditional_losses
from moe_dist.evaluate.held_out_split import HeldOutSplit
from moe_dist.evaluate.perplexity import evaluate, mean_losses


def compare_with_references(
    forward: Callable, held_out: HeldOutSplit, *, train: DocumentStore, store: DocumentStore, causal_too: bool = False
) -> dict[str, float]:
    """Measure the held-out losses of the model and of the references, in nats per token. Collective.

    The references are a bigram model, and the model itself with shuffled captions. Returns a dict from metric key
    (metrics/metric_keys.py) to value.
    forward: a function from a Batch to an output with logits_TV.
    train: the training split, on which the bigram model is fitted. store: the held-out split.
    causal_too: if the model was trained with non-causal routing, also measure the losses with causal routing
    (eval/causal/...).
    """
    layout = held_out.layout

    def of_model(forward: Callable) -> dict[str, float]:
        losses = evaluate(forward, held_out.batches(store), layout, store.domains)
        return losses | conditional_losses(forward, store, held_out) | caption_gain(forward, store, held_out)

    model = of_model(forward)
    causal = of_model(lambda batch: forward(batch.causally())) if causal_too else {}
    pairs = store.has_image.any()
    shuffled = evaluate(forward, held_out.batches(ShuffledCaptions(store)), layout) if pairs else {}
    reference = Bigram.fit(train, held_out.vocabulary, held_out.data)
    bigram = mean_losses(reference.token_losses, held_out.batches(store), layout)
    return (
        model
        | {key.replace("eval/", "eval/causal/"): value for key, value in causal.items()}
        | {key.replace("eval/", "eval/shuffled/"): value for key, value in shuffled.items()}
        | {key.replace("eval/loss", "eval/bigram"): value for key, value in bigram.items()}
    )
