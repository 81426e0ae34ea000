"""Intervals: they hold the mean, and cover the truth as often as they say, with shared images and several seeds."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from stic_ray.core.config import EvaluationConfig
from stic_ray.method.statistics import DIFFERENCES, SCORES, Question, Score, Scores, columns, differences, score_of

ANY = (-math.inf, math.inf)


def asked(values: Sequence[float], images: Sequence[int] | None = None) -> Scores:
    names = [None if images is None else f"{each}.jpg" for each in images or values]
    return {Question(f"{i}", name): value for i, (value, name) in enumerate(zip(values, names, strict=True))}


def interval(
    *values: Sequence[float],
    images: Sequence[int] | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    span: tuple[float, float] = ANY,
) -> Score:
    config = EvaluationConfig(num_resamples=num_resamples, confidence=confidence)
    found = score_of([asked(each, images) for each in values], config, seed, span)
    assert found is not None
    return found


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


def test_questions_about_one_image_count_as_one() -> None:
    """Six questions on each of 60 images that differ in difficulty: the images are what is sampled."""
    generator = np.random.default_rng(0)
    num_held = num_held_apart = 0
    for number in range(200):
        right = np.repeat(generator.normal(0.5, 0.3, 60), 6) + generator.normal(0, 0.3, 360)
        images = np.repeat(np.arange(60), 6).tolist()
        together = interval(right.tolist(), images=images, num_resamples=300, seed=number)
        apart = interval(right.tolist(), num_resamples=300, seed=number)
        num_held += together.low <= 0.5 <= together.high
        num_held_apart += apart.low <= 0.5 <= apart.high
    assert 0.90 < num_held / 200 < 0.99 and num_held_apart / 200 < 0.80


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.043])
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_intervals_know_how_far_trainings_are_apart(spread: float, num_seeds: int) -> None:
    generator = np.random.default_rng(0)
    num_held = 0
    for number in range(200):
        questions = generator.normal(0.05, 0.25, 300)
        runs = [questions + generator.normal(0, spread) + generator.normal(0, 0.1, 300) for _ in range(num_seeds)]
        found = interval(*[run.tolist() for run in runs], num_resamples=300, seed=number)
        num_held += found.low <= 0.05 <= found.high
    assert num_held / 200 > 0.91


def test_seeds_that_share_no_question_are_one_sample() -> None:
    runs = [{Question(f"{run}-{i}"): value for i, value in enumerate((0.0, 1.0) * 20)} for run in range(3)]
    found, alike = score_of(runs, EvaluationConfig()), interval([0.0, 1.0] * 60, num_resamples=2000)
    assert found is not None and (found.low, found.high) == pytest.approx((alike.low, alike.high), abs=0.02)


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


@pytest.mark.parametrize(("values", "images"), [([0.7], None), ([0.5, 0.9], [1, 1])])
def test_one_question_or_one_image_says_nothing_about_the_spread(values: list[float], images: list[int] | None) -> None:
    assert interval(values, images=images) == Score(pytest.approx(0.7), -math.inf, math.inf)


@pytest.mark.parametrize(
    ("value", "span", "low", "high"),
    [
        (1.0, SCORES, 0.8389, 1.0),  # Wilson's interval of 20 of 20
        (0.0, SCORES, 0.0, 0.1611),
        (0.5, SCORES, 0.4194, 0.5806),
        (0.0, DIFFERENCES, -0.1611, 0.1611),
        (1.0, DIFFERENCES, 0.6778, 1.0),
    ],
)
def test_equal_values_are_not_certain(value: float, span: tuple[float, float], low: float, high: float) -> None:
    found = interval([value] * 20, span=span)
    assert (found.low, found.mean, found.high) == pytest.approx((low, value, high), abs=1e-4)
    by_image = interval([value] * 40, images=[i // 2 for i in range(40)], span=span)
    assert by_image == found, "20 images with two questions each"


def test_equal_images_are_not_certain_either() -> None:
    """On every image one of two answers is right."""
    found = interval([0.0, 1.0] * 20, images=[i // 2 for i in range(40)], span=SCORES)
    assert found.low < 0.45 and found.high > 0.55


def test_no_scores_have_no_mean() -> None:
    assert score_of([], EvaluationConfig()) is None and score_of([{}], EvaluationConfig()) is None


def test_differences_are_of_the_questions_that_both_answered() -> None:
    assert differences(asked([1.0, 0.5, 0.0]), asked([0.25, 0.75])) == asked([0.75, -0.25])


def test_columns_hold_what_is_known() -> None:
    assert columns(Score(0.5, 0.25, math.inf), "score", "") == {"score": 0.5, "low": 0.25, "high": None}
    assert columns(None, "f1", "f1_") == {"f1": None, "f1_low": None, "f1_high": None}


def test_a_question_is_the_same_in_runs_that_have_a_copy_of_its_image_each() -> None:
    base = {Question(str(i), f"/runs/a/{i // 2}.jpg"): 0.0 for i in range(8)}
    tuned = {Question(str(i), f"/runs/b/{i // 2}.jpg"): float(i % 2) for i in range(8)}
    assert list(differences(tuned, base).values()) == [tuned[Question(str(i))] for i in range(8)]
    both = score_of([base, tuned], EvaluationConfig(num_resamples=100))
    assert both is not None and both.mean == 0.25
