"""The table of launch/evaluate.py."""

import math

import pytest
from rich.console import Console

from launch.evaluate import perplexity, table


@pytest.mark.parametrize(
    ("loss", "expected"), [(0.0, 1.0), (math.log(12), 12.0), (722.0, math.inf), (math.inf, math.inf)]
)
def test_perplexity(loss, expected):
    assert perplexity(loss) == pytest.approx(expected)


def test_a_loss_too_large_for_a_perplexity_is_shown():
    console = Console(width=200, record=True)
    console.print(table({"eval/loss": 722.0, "eval/shuffled/loss": 1.0}, 3, causal=True))
    shown = console.export_text()
    assert "722.000 / inf" in shown and "1.000 / 2.7" in shown
