"""Bootstrap intervals of scores."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float], *, num_resamples: int, confidence: float, seed: int) -> Interval:
    """Return the mean of `values` and its percentile bootstrap interval.

    Give the paired differences of two systems for the interval of their difference. A single value has no
    spread to estimate: its interval is [-inf, inf], so that nobody takes it for certain.
    """
    assert len(values) > 0, "a mean needs at least one value"
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean, -np.inf, np.inf)
    if np.ptp(data) == 0:
        return Interval(mean, mean, mean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = stats.bootstrap(
            (data,),
            np.mean,
            n_resamples=num_resamples,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
            batch=max(1, 10_000_000 // len(data)),
        )
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))
