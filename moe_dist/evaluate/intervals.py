"""Confidence intervals of an accuracy, of the difference between two models' accuracies on the same items, and of the
mean of a value over all predictions in a set of documents.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

Z95 = NormalDist().inv_cdf(0.975)
Interval = tuple[float, float]


def wilson(right: float, items: float) -> Interval:
    """Return the 95 % interval of the fraction right / items, where items > 0.

    Sources: Wilson 1927, eq. 7; Brown, Cai and DasGupta 2001, eq. 4.
    """
    share, z2 = right / items, Z95**2
    centre = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = Z95 * math.sqrt(share * (1 - share) / items + z2 / (4 * items**2)) / (1 + z2 / items)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(gained: int, lost: int, items: int) -> Interval:
    """Return the 95 % interval of accuracy_2 - accuracy_1, both on the same items (Bonett and Price 2012, eq. 3).

    gained: number of items that only the second model answers correctly.
    lost: number of items that only the first model answers correctly.
    """
    p_gained, p_lost = (gained + 1) / (items + 2), (lost + 1) / (items + 2)
    centre = p_gained - p_lost
    half = Z95 * math.sqrt((p_gained + p_lost - centre**2) / (items + 2))
    return max(-1.0, centre - half), min(1.0, centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p-value of the exact McNemar test. Null hypothesis: gains and losses are equally likely.

    gained, lost: as in paired_difference.
    """
    n, fewer = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


class DocumentSums(NamedTuple):
    """Sums over documents, from which the mean of a value over all predictions and its confidence interval follow.

    For each document, x is the sum of the value over its predictions, and n is the number of these predictions. The
    documents are independent of each other, but the predictions of a document are not.
    """

    documents: float  # number of documents with predictions
    total: float  # sum of x
    predictions: float  # sum of n
    xx: float  # sum of x^2
    xn: float  # sum of x n
    nn: float  # sum of n^2

    @property
    def mean(self) -> float:
        return self.total / self.predictions

    @property
    def variance(self) -> float:
        """The variance of `mean`, computed as that of a ratio of two sums (Cochran 1977, section 2.11).

        There must be at least 2 documents.
        """
        squares = self.xx - 2 * self.mean * self.xn + self.mean**2 * self.nn
        return max(0.0, squares) * self.documents / (self.documents - 1) / self.predictions**2

    def interval(self) -> Interval:
        """Return the 95 % interval of the mean. There must be at least 2 documents."""
        half = Z95 * math.sqrt(self.variance)
        return self.mean - half, self.mean + half

    def share_interval(self) -> Interval:
        """Return the 95 % interval of the mean of values that are 0 or 1. There must be at least 2 documents.

        This is Wilson's interval for the effective number of predictions (Korn and Graubard 1998): the number of
        independent predictions whose mean would have the same variance. If all values are equal, the number of
        documents is used instead.
        """
        spread = self.mean * (1 - self.mean)
        if not spread:
            effective = self.documents
        else:
            effective = min(self.predictions, spread / self.variance) if self.variance else self.predictions
        return wilson(self.mean * effective, effective)
