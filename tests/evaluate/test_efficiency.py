import numpy as np
import pytest

from moe_dist.evaluate.efficiency import eta, flops_to_reach, smoothed

STEPS = np.arange(1.0, 401.0)


def test_a_curve_that_needs_a_third_of_the_arithmetic_has_eta_three():
    flops = 7e9 * STEPS
    loss = 2 + (flops / 1e12) ** -0.3
    faster = 2 + (3 * flops / 1e12) ** -0.3
    found = eta(flops, loss, flops, faster)
    np.testing.assert_allclose(found[30:], 3, rtol=2e-3)  # earlier points are too far apart


def test_a_noisy_curve_is_not_ahead_of_itself():
    loss = 1 / STEPS + 0.01 * np.random.default_rng(0).standard_normal(400)
    np.testing.assert_allclose(eta(STEPS, loss, STEPS, loss), 1)


def test_another_price_of_a_step_counts():
    """Both models have the same loss at each step, but a step of one costs twice as much."""
    loss = 1 / STEPS
    np.testing.assert_allclose(eta(STEPS, loss, 2 * STEPS, loss), 0.5)


def test_a_loss_that_is_never_reached_has_no_eta():
    found = eta(STEPS, 1 / STEPS, STEPS, np.maximum(1 / STEPS, 0.01))
    assert np.isfinite(found[:100]).all() and np.isnan(found[100:]).all()


def test_the_first_time_counts_and_not_later_noise():
    flops, loss = np.array([1.0, 2.0, 3.0, 4.0]), np.array([4.0, 2.0, 3.0, 1.0])
    found = flops_to_reach(flops, loss, np.array([5.0, 3.0, 2.0, 1.5, 0.5]))
    np.testing.assert_allclose(found, [1, 1.5, 2, 3.5, np.nan])


def test_smoothing_is_a_mean_over_a_window():
    np.testing.assert_allclose(smoothed(np.array([1.0, 2.0, 6.0, 1.0]), 2), [1.5, 4.0, 3.5])
    with pytest.raises(ValueError, match="3 steps are fewer than the window of 4"):
        smoothed(np.ones(3), 4)
