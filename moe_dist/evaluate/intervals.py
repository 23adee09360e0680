"""Confidence intervals of an accuracy, and of the difference between two models' accuracies on the same items."""

from __future__ import annotations

import math
from statistics import NormalDist

Z95 = NormalDist().inv_cdf(0.975)
Interval = tuple[float, float]


def wilson(right: int, items: int) -> Interval:
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
