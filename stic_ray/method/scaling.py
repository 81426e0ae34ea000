"""How scores grow with the pool: a saturating power law, and what the next point of score would cost.

score(n) = limit - drop * (n / pivot) ** -exponent, with drop >= 0, an exponent within EXPONENTS and a limit that no
score can pass. The pivot is the geometric mean of the sizes; it only keeps the numbers of a common magnitude.
Scores for which lower is better are negated by the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_SIZES = 4
"""Three parameters need one point more."""
EXPONENTS = (0.02, 4.0)
"""Slower growth cannot be distinguished from a logarithm, faster growth not from a step."""

Floats = NDArray[np.float64]

_NUM_EXPONENTS = 160
_GRID: Floats = np.geomspace(*EXPONENTS, _NUM_EXPONENTS)
_STEP = float(_GRID[1] / _GRID[0])
_FLAT = 1e-9


class FitError(ValueError):
    """The curve cannot be fitted; the message is the reason in words."""


@dataclass(frozen=True)
class Curve:
    """A saturating power law."""

    limit: float
    drop: float
    """How far the curve is below its limit at `pivot` images."""
    exponent: float
    pivot: float

    def at(self, sizes: Sequence[float] | Floats) -> Floats:
        """Return the scores at these sizes."""
        return self.limit - self.drop * (np.asarray(sizes, dtype=np.float64) / self.pivot) ** -self.exponent

    @property
    def factor(self) -> float:
        """The factor a of score(n) = limit - a * n ** -exponent."""
        return self.drop * self.pivot**self.exponent

    @property
    def is_at_bound(self) -> bool:
        """Whether the data would have liked an exponent that is not allowed; the limit means little then."""
        low, high = EXPONENTS
        return self.drop > _FLAT and not low * 1.01 < self.exponent < high * 0.99

    def further_images(self, size: float, gain: float) -> float:
        """Return how many images beyond `size` raise the score by `gain`; infinite when the limit is closer."""
        below = self.limit - float(self.at([size])[0])
        if below <= gain:
            return float("inf")
        with np.errstate(over="ignore"):
            return float(np.float64(size) * (np.float64(below / (below - gain)) ** (1 / self.exponent) - 1))


def fit_curve(sizes: Sequence[int], scores: Sequence[float], ceiling: float) -> Curve:
    """Return the least-squares curve through (size, score) with limit <= ceiling.

    Raises FitError for too few sizes, and scores that are not numbers.
    """
    if len(sizes) < MIN_SIZES:
        raise FitError(f"a curve needs at least {MIN_SIZES} sizes with scores, there are {len(sizes)}")
    given = np.asarray([scores], dtype=np.float64)
    if not np.isfinite(given).all():
        raise FitError("a score is not a number")
    around = fit_curves(sizes, given, ceiling)[0].exponent * np.geomspace(1 / _STEP, _STEP, _NUM_EXPONENTS)
    return fit_curves(sizes, given, ceiling, np.clip(around, *EXPONENTS))[0]


def fit_curves(sizes: Sequence[int], scores: Floats, ceiling: float, exponents: Floats = _GRID) -> list[Curve]:
    """Return the best curve with one of the exponents for each row of `scores`."""
    x = np.asarray(sizes, dtype=np.float64)
    pivot = float(np.exp(np.log(x).mean()))
    best_error = np.full(len(scores), np.inf)
    best = np.zeros((len(scores), 3))
    for exponent in exponents:
        power = (x / pivot) ** -exponent
        for limit, drop in _lines(power, scores, ceiling):
            error = ((limit[:, None] - drop[:, None] * power - scores) ** 2).sum(axis=1)
            # A flat curve fits with every exponent: the first one stays.
            better = (drop >= 0) & (limit <= ceiling) & (error < best_error - 1e-15)
            best_error = np.where(better, error, best_error)
            best[better] = np.stack([limit, drop, np.full_like(limit, exponent)], axis=1)[better]
    return [Curve(float(limit), float(drop), float(exponent), pivot) for limit, drop, exponent in best]


def _lines(power: Floats, scores: Floats, ceiling: float) -> list[tuple[Floats, Floats]]:
    """Return the candidates (limit, drop) for one exponent: free, without a drop, and with the limit at the ceiling."""
    mean_power, mean_score = power.mean(), scores.mean(axis=1)
    centred = power - mean_power
    drop = -(scores @ centred) / (centred**2).sum()
    flat = np.zeros_like(mean_score)
    at_ceiling = np.maximum(0.0, ((ceiling - scores) @ power) / (power**2).sum())
    return [
        (np.minimum(mean_score, ceiling), flat),
        (mean_score + drop * mean_power, drop),
        (np.full_like(mean_score, ceiling), at_ceiling),
    ]
