"""Bootstrap intervals: they hold the mean, and cover the truth as often as they say."""

import math

import numpy as np
import pytest

from stic_ray.method.statistics import Interval, bootstrap_mean


def interval(values: list[float], *, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Interval:
    return bootstrap_mean(values, num_resamples=num_resamples, confidence=confidence, seed=seed)


@pytest.mark.parametrize(
    "values", [[0.0, 1.0], [0.0] * 99 + [1.0], [0.0, 1.0] * 50, [0.3, 0.3, 0.6, 1.0], list(np.linspace(-3, 9, 40))]
)
def test_the_interval_holds_the_mean_and_stays_within_the_values(values: list[float]) -> None:
    found = interval(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert min(values) <= found.low <= found.mean <= found.high <= max(values)


def test_the_interval_of_a_hundred_coins_is_the_one_of_the_textbook() -> None:
    """50 of 100: standard error 0.05, so 0.5 +- 1.96 * 0.05 = 0.402 to 0.598."""
    found = interval([0.0, 1.0] * 50, num_resamples=4000)
    assert found.low == pytest.approx(0.402, abs=0.012)
    assert found.high == pytest.approx(0.598, abs=0.012)


@pytest.mark.parametrize(("confidence", "lowest", "highest"), [(0.95, 0.90, 0.98), (0.5, 0.42, 0.58)])
def test_intervals_cover_the_truth_as_often_as_they_say(confidence: float, lowest: float, highest: float) -> None:
    """300 samples of 60 from a normal distribution with mean 2: a percentile interval is slightly too short."""
    generator = np.random.default_rng(0)
    found = [
        interval(list(generator.normal(2.0, 1.0, 60)), num_resamples=300, confidence=confidence, seed=number)
        for number in range(300)
    ]
    assert lowest < np.mean([one.low <= 2.0 <= one.high for one in found]) < highest


def test_more_confidence_is_a_wider_interval_and_more_values_a_narrower_one() -> None:
    values = list(np.random.default_rng(1).normal(size=50))
    widths = [interval(values, confidence=confidence) for confidence in (0.5, 0.9, 0.99)]
    assert widths[0].high - widths[0].low < widths[1].high - widths[1].low < widths[2].high - widths[2].low
    many = interval(values * 16)
    assert (many.high - many.low) < 0.4 * (widths[1].high - widths[1].low)


def test_the_seed_decides() -> None:
    values = list(np.random.default_rng(1).normal(size=50))
    assert interval(values, seed=3) == interval(values, seed=3)
    assert interval(values, seed=3) != interval(values, seed=4)


def test_one_value_says_nothing_about_its_spread() -> None:
    assert interval([0.7]) == Interval(0.7, -math.inf, math.inf)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_values_have_no_spread(value: float) -> None:
    found = interval([value] * 30)
    assert (found.low, found.mean, found.high) == pytest.approx((value, value, value))


def test_no_values_have_no_mean() -> None:
    with pytest.raises(AssertionError, match="at least one value"):
        interval([])
