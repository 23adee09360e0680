"""The learning-rate schedule: its boundaries, its shape and its formula."""

import math
from itertools import pairwise

import pytest

from moe_dist.config.recipe import ScheduleConfig
from moe_dist.training.schedule import learning_rate


def curve(steps, peak=1.0, **settings):
    config = ScheduleConfig(peak_lr=peak, **settings)
    return [learning_rate(step, config=config, steps=steps) for step in range(steps)]


def test_warmup_climbs_in_equal_parts_to_the_peak():
    assert curve(20, peak=0.8, warmup_steps=4)[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_peak_once_then_down_to_the_end(kind, warmup):
    rates = curve(30, peak=2.0, type=kind, warmup_steps=warmup, end_lr=0.25)
    top = max(warmup - 1, 0)
    assert rates[top] == 2.0
    assert rates[-1] == pytest.approx(0.25, abs=1e-15)
    falling = rates[top:]
    assert all(a > b for a, b in pairwise(falling))


def test_linear_halfway_and_cosine_quarter():
    assert curve(11, type="linear", end_lr=0.2)[5] == pytest.approx(0.6)
    assert curve(9, type="cosine", end_lr=0.0)[2] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_beyond_the_horizon_it_stays_at_the_end():
    config = ScheduleConfig(type="cosine", warmup_steps=2, peak_lr=1.0, end_lr=0.1)
    assert [learning_rate(s, config=config, steps=10) for s in (9, 10, 1000)] == pytest.approx([0.1] * 3)


def test_horizons_shorter_than_the_warmup_never_pass_the_peak():
    assert curve(1, peak=3.0, warmup_steps=4) == pytest.approx([0.75])
    assert curve(1, peak=3.0) == [3.0]
    assert curve(4, peak=3.0, warmup_steps=4)[-1] == 3.0
