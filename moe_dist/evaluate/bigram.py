"""A smoothed bigram model of the token streams: the baseline that a trained model must beat.

Interpolated absolute discounting (Ney, Essen and Kneser 1994; Chen and Goodman 1999, eq. 15):
  P(w|v) = max(c(v,w) - D, 0) / c(v) + f(v) B(w),   f(v) = probability mass freed by discounting v's successors
  B(w) = a c(w) / N + b k(w) / K + (1 - a - b) / V
where c(v,w) is the number of bigrams (v, w), c(v) is the number of bigrams that begin with v, c(w) is the number of
bigrams that end with w, and N is the total number of bigrams. Here, k(w) is the number of different predecessors of
w (Kneser and Ney 1995), K is the sum of all k(w), and V is the size of the vocabulary.

There is one model for contexts that are text tokens and one for contexts that are image tokens. The parameters D, a and
b are fitted on a tenth of the training documents, using counts from the other nine tenths. Documents with the same text
are on the same side of this division. Otherwise repeated captions would make new bigrams look rarer in the fit than
they are in the held-out split. After the fit, all training documents are counted. The discount D may exceed 1, because
a bigram of a repeated caption is counted once for every repetition.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_dist.config.recipe import DataConfig
from moe_dist.core.batch import MODALITIES, Batch
from moe_dist.data.stream.held_out_batches import whole_captions
from moe_dist.data.stream.packing import DocumentStore
from moe_dist.data.tokenizers.vocabulary import Vocabulary

FITTING_PARTS = 10  # one of these parts is left out of the counts while D, a and b are fitted
DISCOUNTS = np.geomspace(0.1, 20, 28)


@dataclass(frozen=True)
class Bigrams:
    """Pairs of a token (the context) and the token that follows it, as two arrays of equal length."""

    context: np.ndarray
    following: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[np.ndarray]) -> Bigrams:
        empty = np.zeros(0, dtype=np.int64)
        return cls(
            np.concatenate([empty, *(tokens[:-1] for tokens in documents)]),
            np.concatenate([empty, *(tokens[1:] for tokens in documents)]),
        )

    def where(self, chosen: np.ndarray) -> Bigrams:
        return Bigrams(self.context[chosen], self.following[chosen])


class Counts:
    """Bigram counts over a vocabulary of `size` ids, and three distributions of single tokens computed from them.

    The distributions are c(w) / N, k(w) / K and 1 / V (see the module's docstring).
    """

    def __init__(self, bigrams: Bigrams, size: int):
        self._size = size
        self._keys, self._pairs = np.unique(bigrams.context * size + bigrams.following, return_counts=True)
        self._totals = np.bincount(bigrams.context, minlength=size)
        unigram = np.bincount(bigrams.following, minlength=size)
        predecessors = np.bincount(self._keys % size, minlength=size)
        self._lower = np.stack([counts / max(counts.sum(), 1) for counts in (unigram, predecessors, np.ones(size))])

    def estimates(self, bigrams: Bigrams, discount: float) -> np.ndarray:
        """Return the four terms of the probability P(w|v) of each of n bigrams (v, w), as an array [4, n].

        The first row is the discounted bigram term. The other rows are f(v) times c(w) / N, k(w) / K and 1 / V, not yet
        multiplied by their weights a, b and 1 - a - b. The module's docstring defines the symbols.
        """
        freed = np.bincount(self._keys // self._size, np.minimum(self._pairs, discount), minlength=self._size)
        total = self._totals[bigrams.context]
        f = np.where(total > 0, freed[bigrams.context] / np.maximum(total, 1), 1.0)
        count = self._lookup(bigrams.context * self._size + bigrams.following)
        bigram = np.maximum(count - discount, 0) / np.maximum(total, 1)
        return np.concatenate([bigram[None], f * self._lower[:, bigrams.following]])

    def _lookup(self, keys: np.ndarray) -> np.ndarray:
        if not len(self._keys):
            return np.zeros(len(keys), dtype=np.int64)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._pairs[at], 0)


@dataclass(frozen=True)
class ContextModel:
    """The fitted distribution P(w|v) of the token w after the context v, for all contexts of one modality."""

    counts: Counts
    discount: float
    weights: np.ndarray  # a, b, 1 - a - b

    @classmethod
    def fit(cls, counted: Bigrams, kept_out: Bigrams, everything: Bigrams, size: int) -> ContextModel:
        counts = Counts(counted, size)
        fits = {discount: fit_weights(counts.estimates(kept_out, discount)) for discount in DISCOUNTS}
        discount, (weights, _) = min(fits.items(), key=lambda item: item[1][1])
        return cls(Counts(everything, size), float(discount), weights)

    def probability(self, bigrams: Bigrams) -> np.ndarray:
        parts = self.counts.estimates(bigrams, self.discount)
        return parts[0] + self.weights @ parts[1:]


def fit_weights(parts: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit the weights a, b and 1 - a - b of the bigram model by expectation maximisation.

    parts: the four terms of P(w|v), as returned by Counts.estimates. Returns the three weights, which multiply the last
    three terms, and the mean loss in nats with these weights.
    """
    weights = np.full(3, 1 / 3)
    for _ in range(30):
        joint = weights[:, None] * parts[1:]
        expected = (joint / (parts[0] + joint.sum(0))).sum(1) + 1e-3  # never 0: unseen ids have a probability
        weights = expected / expected.sum()
    return weights, float(-np.log(parts[0] + weights @ parts[1:]).mean()) if parts.shape[1] else 0.0


class Bigram:
    """The bigram model: one ContextModel per modality.

    To measure its loss, pass the method `token_losses` to perplexity.mean_losses. The result can be compared with the
    losses that perplexity.evaluate returns for a trained model.
    """

    def __init__(self, models: Sequence[ContextModel], modality_of: np.ndarray):
        self._models = models
        self._modality_of = modality_of

    @classmethod
    def fit(cls, store: DocumentStore, vocabulary: Vocabulary, data: DataConfig) -> Bigram:
        """Fit a model on the training documents. They are assembled as in the first epoch, without caption dropout."""
        assembler = whole_captions(store, vocabulary, data)
        documents = [assembler(0, i).tokens for i in range(len(store))]
        aside = np.array([zlib.crc32(_content(store, i)) % FITTING_PARTS == 0 for i in range(len(store))])
        counted, kept_out = (Bigrams.of([documents[i] for i in np.flatnonzero(part)]) for part in (~aside, aside))
        modality_of = vocabulary.modality_of.numpy()
        models = []
        for modality in range(len(MODALITIES)):
            parts = [b.where(modality_of[b.context] == modality) for b in (counted, kept_out, Bigrams.of(documents))]
            models.append(ContextModel.fit(parts[0], parts[1], parts[2], len(modality_of)))
        return cls(models, modality_of)

    def log_probability(self, bigrams: Bigrams) -> np.ndarray:
        """Return the natural logarithm of P(following | context) for each of n bigrams, as an array [n]."""
        result = np.zeros(len(bigrams.context))
        for modality, model in enumerate(self._models):
            chosen = self._modality_of[bigrams.context] == modality
            result[chosen] = np.log(model.probability(bigrams.where(chosen)))
        return result

    def token_losses(self, batch: Batch) -> Tensor:
        """Return the loss of each prediction in nats, [T]. It is 0 where the loss mask is False."""
        losses_T = torch.zeros(batch.tokens_T.shape, dtype=torch.float64)
        mask_T = batch.loss_mask_T.cpu()
        bigrams = Bigrams(batch.tokens_T.cpu()[mask_T].numpy(), batch.targets_T.cpu()[mask_T].numpy())
        losses_T[mask_T] = torch.from_numpy(-self.log_probability(bigrams))
        return losses_T.to(batch.tokens_T.device)


def _content(store: DocumentStore, index: int) -> bytes:
    document = store.document(index)
    ids = document.text if len(document.text) or document.image is None else document.image
    return np.ascontiguousarray(ids).tobytes()
