"""Intervals and the exact test, compared with published figures and their nominal coverage."""

import math
import random

import pytest

from moe_dist.evaluate.intervals import DocumentSums, mcnemar, paired_difference, wilson


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    [  # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_intervals(right, items, low, high):
    assert wilson(right, items) == pytest.approx((low, high), abs=5e-5)
    assert wilson(items - right, items) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_mcnemar_is_the_binomial_tail():
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert 0 < mcnemar(3000, 3400) < 1e-5  # too large for floating-point factorials


def test_the_paired_interval_covers_as_often_as_it_says():
    """For pairs drawn with a known difference, about 95 % of the intervals contain it."""
    draw, items, p_gained, p_lost = random.Random(0), 150, 0.15, 0.08
    covered = 0
    for _ in range(2000):
        outcomes = [draw.random() for _ in range(items)]
        gained = sum(u < p_gained for u in outcomes)
        lost = sum(p_gained <= u < p_gained + p_lost for u in outcomes)
        low, high = paired_difference(gained, lost, items)
        covered += low <= p_gained - p_lost <= high
    assert 0.93 < covered / 2000 < 0.97
    low, high = paired_difference(30, 10, 200)
    assert math.isclose(low + high, 2 * 20 / 202) and -1 <= low < 0.1 < high <= 1


def document_sums(documents):
    """documents: the values of the predictions of each document."""
    x, n = [sum(values) for values in documents], [len(values) for values in documents]
    pairs = list(zip(x, n))
    moments = [sum(a * a for a in x), sum(a * b for a, b in pairs), sum(b * b for b in n)]
    return DocumentSums(len(documents), sum(x), sum(n), *moments)


def test_intervals_over_documents_cover_as_often_as_they_say():
    """Half of the documents are easy, so their predictions depend on each other. Wilson's interval over predictions
    would be far too narrow."""
    draw, covered, covered_by_wilson = random.Random(0), {"interval": 0, "share_interval": 0}, 0
    for _ in range(600):
        documents = []
        for _ in range(80):
            p = draw.choice([0.2, 0.8])
            documents.append([float(draw.random() < p) for _ in range(draw.randint(5, 40))])
        sums = document_sums(documents)
        for name in covered:
            low, high = getattr(sums, name)()
            covered[name] += low <= 0.5 <= high
        low, high = wilson(sums.total, sums.predictions)
        covered_by_wilson += low <= 0.5 <= high
    assert all(0.92 < hits / 600 < 0.98 for hits in covered.values()), covered
    assert covered_by_wilson / 600 < 0.6


def test_intervals_over_documents_of_one_prediction_each():
    values = [1.0] * 12 + [0.0] * 18
    sums = document_sums([[value] for value in values])
    assert sums.share_interval() == pytest.approx(wilson(12, 30), abs=5e-3)
    assert document_sums([[1.0] * 9] * 4).share_interval() == wilson(4, 4), "all right: as many as documents"
