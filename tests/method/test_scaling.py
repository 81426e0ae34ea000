"""The saturating power law finds what made the data, and says when there is nothing to find."""

import math

import numpy as np
import pytest

from stic_ray.method.scaling import EXPONENTS, Curve, FitError, fit_curve, fit_curves

SIZES = (250, 1000, 4000, 16000)
TRUE = Curve(limit=0.7, drop=0.08, exponent=0.5, pivot=2000.0)


@pytest.mark.parametrize("exponent", [0.15, 0.5, 1.2])
@pytest.mark.parametrize("limit", [0.4, 0.95])
def test_parameters_are_recovered(exponent: float, limit: float) -> None:
    true = Curve(limit, 0.05, exponent, 2000.0)
    found = fit_curve(SIZES, true.at(SIZES).tolist(), ceiling=1.0)
    assert found.limit == pytest.approx(limit, abs=1e-3)
    assert found.exponent == pytest.approx(exponent, rel=1e-2)
    assert found.factor == pytest.approx(true.factor, rel=2e-2)
    assert np.allclose(found.at(SIZES), true.at(SIZES), atol=1e-5)


def test_noise_moves_the_curve_little() -> None:
    noise = np.random.default_rng(0).normal(scale=0.002, size=6)
    sizes = (250, 500, 1000, 4000, 8000, 16000)
    found = fit_curve(sizes, (TRUE.at(sizes) + noise).tolist(), ceiling=1.0)
    assert np.abs(found.at(sizes) - TRUE.at(sizes)).max() < 0.005


def test_resamples_are_fitted_as_one_fit_would_be() -> None:
    scores = TRUE.at(SIZES) + np.random.default_rng(0).normal(scale=0.003, size=(20, 4))
    for row, curve in zip(scores, fit_curves(SIZES, scores, 1.0), strict=True):
        alone = fit_curve(SIZES, row.tolist(), 1.0)
        assert np.allclose(curve.at(SIZES), alone.at(SIZES), atol=2e-3)


@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.5, 0.5], [0.5, 0.49, 0.47, 0.46], [0.0] * 4, [1.0] * 4])
def test_flat_and_falling_scores_never_gain(scores: list[float]) -> None:
    curve = fit_curve(SIZES, scores, ceiling=1.0)
    assert curve.drop == 0 and curve.limit == pytest.approx(np.mean(scores))
    assert curve.further_images(16000, 0.01) == math.inf and not curve.is_at_bound


def test_the_next_point_costs_what_the_curve_says() -> None:
    further = TRUE.further_images(1000, 0.01)
    assert TRUE.at([1000 + further])[0] - TRUE.at([1000])[0] == pytest.approx(0.01)
    assert TRUE.further_images(10**6, 0.01) == math.inf, "the limit is closer than a point"


def test_no_limit_above_what_a_score_can_be() -> None:
    growing = [0.5, 0.65, 0.8, 0.95]  # as the logarithm does
    assert fit_curve(SIZES, growing, ceiling=1.0).limit <= 1.0
    assert fit_curve(SIZES, [score - 1 for score in growing], ceiling=0.0).limit <= 0.0


def test_growth_without_an_end_is_told() -> None:
    curve = fit_curve(SIZES, [0.1, 0.2, 0.3, 0.4], ceiling=100.0)
    assert curve.is_at_bound and curve.exponent == pytest.approx(EXPONENTS[0], rel=0.02)
    assert math.isfinite(curve.further_images(16000, 0.01))


def test_a_step_is_told() -> None:
    assert fit_curve(SIZES, [0.1, 0.5, 0.5, 0.5], ceiling=1.0).is_at_bound


@pytest.mark.parametrize(
    ("sizes", "scores", "message"),
    [
        ((250, 1000), [0.1, 0.2], "at least 4 sizes with scores, there are 2"),
        ((), [], "there are 0"),
        (SIZES, [0.1, 0.2, math.nan, 0.3], "not a number"),
        (SIZES, [0.1, 0.2, math.inf, 0.3], "not a number"),
    ],
)
def test_what_cannot_be_fitted_is_a_stated_result(sizes: tuple[int, ...], scores: list[float], message: str) -> None:
    with pytest.raises(FitError, match=message):
        fit_curve(sizes, scores, ceiling=1.0)
