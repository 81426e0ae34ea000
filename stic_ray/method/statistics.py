"""Means of scores with intervals that know which questions share an image, and how far seeds are apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stic_ray.core.config import EvaluationConfig
from stic_ray.core.randomness import seed_for

SCORES, DIFFERENCES = (0.0, 1.0), (-1.0, 1.0)
"""Between what a score, and the difference of two, can lie."""


@dataclass(frozen=True, order=True)
class Question:
    """What was asked, and about which image: answers about one image are right or wrong together.

    Runs may have a copy of the image each: a question is the same by its id.
    """

    id: str
    image: str | None = field(default=None, compare=False)


Scores = Mapping[Question, float]
"""What one model scored in one run."""


@dataclass(frozen=True)
class Score:
    """A mean with its confidence interval, infinite where that cannot be known."""

    mean: float
    low: float
    high: float


def score_of(
    by_seed: Sequence[Scores], config: EvaluationConfig, seed: int = 0, span: tuple[float, float] = SCORES
) -> Score | None:
    """Return the mean over questions and seeds with its interval; None without scores.

    The interval holds the middle of `resampled_means`. Where these are all equal, as for 20 of 20 right answers, a
    share of further images could still have any other value in the `span`: the upper end of Wilson's interval for
    none of so many. One image alone, or one question, has no spread to estimate: [-inf, inf].
    """
    values, clusters = _table(by_seed)
    if not values.size:
        return None
    mean, num_clusters = float(values.mean()), len(np.unique(clusters))
    if num_clusters == 1:
        return Score(mean, -np.inf, np.inf)
    draws = resampled_means(by_seed, config.num_resamples, seed_for(seed, "", "bootstrap"), span)
    if np.ptp(draws) < 1e-12:
        other = float(stats.binomtest(0, num_clusters).proportion_ci(config.confidence, method="wilson").high)
        return Score(mean, mean - other * (mean - span[0]), mean + other * (span[1] - mean))
    low, high = np.quantile(draws, [(1 - config.confidence) / 2, (1 + config.confidence) / 2])
    return Score(mean, min(float(low), mean), max(float(high), mean))


def resampled_means(by_seed: Sequence[Scores], num: int, seed: int, span: tuple[float, float]) -> NDArray[np.float64]:
    """Return `num` means as they could have been: images drawn anew with all of their questions.

    Of several seeds, each mean is moved by Student's t times the standard error over seeds: they are too few to be
    drawn anew.
    """
    values, clusters = _table(by_seed)
    sizes, sums = np.bincount(clusters), np.bincount(clusters, values.mean(axis=0))
    random = np.random.default_rng(seed)
    draws = np.full(num, values.mean())
    if len(sizes) > 1:
        draws = stats.bootstrap(
            (sums, sizes),
            lambda total, number, axis: total.sum(axis) / number.sum(axis),
            n_resamples=num,
            paired=True,
            vectorized=True,
            method="percentile",
            rng=random,
            batch=max(1, 10_000_000 // len(sizes)),
        ).bootstrap_distribution
    if len(values) > 1:
        draws = draws + stats.sem(values.mean(axis=1)) * random.standard_t(len(values) - 1, num)
    return np.clip(draws, *span)


def differences(scores: Scores, base: Scores) -> dict[Question, float]:
    """Return by question how far a model is from another, for the questions that both answered."""
    return {each: scores[each] - base[each] for each in sorted(scores.keys() & base.keys())}


def summary(
    by_seed: Sequence[Scores], bases: Sequence[Scores], config: EvaluationConfig, seed: int = 0
) -> dict[str, float | None]:
    """Return the mean score and its difference to the base model's by question, each with its interval, as columns.

    `bases` are what the base model scored in the same runs; without questions that both answered the differences are
    not known.
    """
    apart = [differences(scores, base) for scores, base in zip(by_seed, bases, strict=True)]
    return {
        **columns(score_of(by_seed, config, seed), "score", ""),
        **columns(score_of(apart, config, seed, DIFFERENCES), "difference", "difference_"),
    }


def columns(score: Score | None, name: str, prefix: str) -> dict[str, float | None]:
    """Return a score as tables and files have it: `name`, and with `prefix` low and high; None for the unknown."""
    values = (score.mean, score.low, score.high) if score else (None, None, None)
    known = [value if value is not None and np.isfinite(value) else None for value in values]
    return dict(zip((name, f"{prefix}low", f"{prefix}high"), known, strict=True))


def _table(by_seed: Sequence[Scores]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return scores as seeds x questions, and the cluster of each question, which is its image.

    Seeds that share no question become one row of all their questions.
    """
    by_seed = [scores for scores in by_seed if scores]
    shared = sorted(set.intersection(*(set(scores) for scores in by_seed))) if by_seed else []
    rows = [[scores[each] for each in shared] for scores in by_seed]
    if not shared:
        shared = [each for scores in by_seed for each in scores]
        rows = [[value for scores in by_seed for value in scores.values()]]
    names: dict[Any, int] = {}
    clusters = [names.setdefault(each.image or each, len(names)) for each in shared]
    return np.array(rows, dtype=np.float64), np.array(clusters, dtype=np.intp)
