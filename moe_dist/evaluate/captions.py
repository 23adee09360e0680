"""Caption gain: how much better a model predicts an image after its own caption than after another image's caption.

Every image is evaluated twice, each time in a separate document: once after its own caption and once after another
image's caption. The gain of an image is the difference between these two losses. The gains of all images with the same
caption are averaged first, because such images are not independent (for example, one emoji drawn by several vendors).
The caption gain is the mean over captions.

Shape suffixes: T tokens of a micro-batch, N documents of a micro-batch.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from moe_dist.core.batch import IMAGE, Batch
from moe_dist.data.stream.held_out_batches import ShuffledCaptions
from moe_dist.data.stream.packing import DocumentStore
from moe_dist.evaluate.conditional import Pairs
from moe_dist.evaluate.held_out_split import HeldOutSplit
from moe_dist.evaluate.intervals import Z95
from moe_dist.parallel.agreement import gather_objects

Image = tuple[int, ...]  # the codes of an image


def caption_gain(forward: Callable, store: DocumentStore, held_out: HeldOutSplit) -> dict[str, float]:
    """Measure the caption gain on a store's image-text pairs, in nats per image code. Collective.

    The images are evaluated twice: with their own captions, and with shuffled captions. Only images that occur in both
    evaluations count. Returns eval/caption_gain, its 95 % interval as eval/caption_gain/low and eval/caption_gain/high,
    and the number of captions as eval/caption_gain/captions. The result is empty if there are fewer than two captions.
    forward: Batch -> an output with logits_TV. held_out: which pairs to evaluate.
    """
    pairs, held_out = Pairs(store), held_out.ordered(image_first=False)
    if len({_key(pairs.document(i).text) for i in range(len(pairs))}) < 2:
        return {}

    def image_losses(of: DocumentStore) -> dict[Image, float]:
        return _image_losses(forward, (batch.to(held_out.layout.device) for batch in held_out.batches(of)))

    own, shuffled = image_losses(pairs), image_losses(ShuffledCaptions(pairs))
    gains = defaultdict(list)
    for document in map(pairs.document, range(len(pairs))):
        image = _key(document.image)
        if image in own and image in shuffled:
            gains[_key(document.text)].append(shuffled[image] - own[image])
    if len(gains) < 2:
        return {}
    means = [statistics.mean(found) for found in gains.values()]
    gain, half = statistics.mean(means), Z95 * statistics.stdev(means) / math.sqrt(len(means))
    found = {"": gain, "/low": gain - half, "/high": gain + half, "/captions": len(means)}
    return {f"eval/caption_gain{end}": value for end, value in found.items()}


@torch.no_grad()
def _image_losses(forward: Callable, batches: Iterable[Batch]) -> dict[Image, float]:
    """Return a dict from each image to its mean loss per code, averaged over the image's occurrences on all ranks.

    Collective.
    """
    found = defaultdict(list)
    for batch in batches:
        losses_T = F.cross_entropy(forward(batch).logits_TV.float(), batch.targets_T, reduction="none").double()
        counted_T = batch.loss_mask_T & (batch.target_modality_T == IMAGE)
        documents = len(batch.info.document_lengths)
        sums_N = losses_T.new_zeros(documents).index_add_(0, batch.info.document_T, losses_T * counted_T)
        codes = defaultdict(list)
        for number, code in zip(batch.info.document_T[counted_T].tolist(), batch.targets_T[counted_T].tolist()):
            codes[number].append(code)
        for number, image in codes.items():
            found[tuple(image)].append(float(sums_N[number]) / len(image))
    united: dict[Image, list[float]] = defaultdict(list)
    for of_rank in gather_objects(dict(found)):
        for image, losses in of_rank.items():
            united[image] += losses
    return {image: statistics.mean(losses) for image, losses in united.items()}


def _key(ids) -> Image:
    return tuple(int(i) for i in ids)
