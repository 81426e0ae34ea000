"""What the cells say together: means over seeds, gains with intervals, fitted curves and the price of a point."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stic_ray.core.config import EvaluationConfig
from stic_ray.core.randomness import seed_for
from stic_ray.method.scaling import FitError, fit_curve, fit_curves
from stic_ray.method.statistics import SCORES, Scores, columns, resampled_means, score_of, summary
from stic_ray.study.processes import DONE
from stic_ray.study.results import DIRECT, Result, Series, base_scores

POINT = 0.01
"""A point of score."""
NUM_FITS = 400
"""Resamples behind the interval of a fit."""
NUM_CURVE_POINTS = 60


def analyse(results: Sequence[Result], config: EvaluationConfig) -> dict[str, Any]:
    """Return curves (one per variant, model, mode, benchmark and metric) and base scores in JSON's own types."""
    higher: dict[tuple[str, str], bool] = {}
    for result in results:
        higher |= result.higher_is_better
    bases = base_scores(results)
    curves = []
    for (variant, series), by_size in _by_curve(results).items():
        is_higher = higher.get(series.measure, True)
        scores = {size: [result.scores[series] for result in seeds] for size, seeds in by_size.items()}
        curves.append(
            {
                "variant": variant,
                **series._asdict(),
                "higher_is_better": is_higher,
                "points": [_point(series, seeds, bases, is_higher, config) for seeds in by_size.values()],
                "fit": _fit(scores, is_higher, config),
            }
        )
    return {"confidence": config.confidence, "base": _base(results, config), "curves": curves}


def _by_curve(results: Sequence[Result]) -> dict[tuple[str, Series], dict[int, list[Result]]]:
    """Return the cells of each variant and series by size, sizes rising, models and modes in the pipeline's order."""
    groups: dict[tuple[str, Series], dict[int, list[Result]]] = {}
    for result in sorted(results, key=lambda result: (result.run.size, result.run.seed)):
        for series in result.scores if not result.run.is_source else ():
            groups.setdefault((result.run.variant, series), {}).setdefault(result.run.size, []).append(result)
    variants = list(dict.fromkeys(result.run.variant for result in results))
    models = list(dict.fromkeys(series.model for result in results for series in result.scores))

    def order(key: tuple[str, Series]) -> tuple[Any, ...]:
        variant, series = key
        return series.measure, variants.index(variant), models.index(series.model), series.mode != DIRECT

    return {key: groups[key] for key in sorted(groups, key=order)}


def _base(results: Sequence[Result], config: EvaluationConfig) -> list[dict[str, Any]]:
    """Return the base model's scores answering directly, over the seeds of the first source of each."""
    sources = [result for result in results if result.run.is_source and result.status == DONE]
    first = {result.run.seed: result for result in reversed(sources)}
    by_measure: dict[tuple[str, str], list[Scores]] = {}
    for (_, measure), scores in base_scores(list(first.values())).items():
        by_measure.setdefault(measure, []).append(scores)
    return [
        {"benchmark": benchmark, "metric": metric, **columns(score_of(scores, config), "score", "")}
        for (benchmark, metric), scores in by_measure.items()
    ]


def _point(
    series: Series,
    seeds: Sequence[Result],
    bases: Mapping[tuple[str, tuple[str, str]], Scores],
    is_higher: bool,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """Return the mean over the seeds of one size, its difference to the base model, and what that cost."""
    scores = [result.scores[series] for result in seeds]
    found = summary(scores, [bases.get((each.run.source, series.measure), {}) for each in seeds], config)
    costs = [result.costs[series.model] for result in seeds]
    core_hours = float(np.mean([cost.core_hours for cost in costs]))
    gpu_hours = float(np.mean([cost.gpu_hours for cost in costs]))
    return {
        "size": seeds[0].run.size,
        "seeds": [result.run.seed for result in seeds],
        **found,
        "spread": spread(scores),
        "higher_is_better": is_higher,
        "core_hours": core_hours,
        "gpu_hours": gpu_hours,
        "hours_per_point": _per_point(gpu_hours or core_hours, found, is_higher),
        "hours_are": "GPU-hours" if gpu_hours else "core-hours",
    }


def spread(by_seed: Sequence[Scores]) -> float | None:
    """Return the standard deviation of the means over seeds; None for one seed."""
    means = [float(np.mean(list(scores.values()))) for scores in by_seed]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def _per_point(hours: float, found: Mapping[str, float | None], is_higher: bool) -> dict[str, float | None]:
    """Return hours per point gained, at the gain and at both ends of its interval; None where nothing is gained."""
    least, most = ("low", "high") if is_higher else ("high", "low")

    def price(name: str) -> float | None:
        gain = (found[name] or 0.0) * (1 if is_higher else -1)
        return hours * POINT / gain if gain > 0 else None

    return {"value": price("difference"), "low": price(f"difference_{most}"), "high": price(f"difference_{least}")}


def _fit(by_size: Mapping[int, list[Scores]], is_higher: bool, config: EvaluationConfig) -> dict[str, Any]:
    """Return the fitted curve with intervals, or the reason why there is none."""
    sizes, sign = list(by_size), 1 if is_higher else -1  # what is fitted grows: scores, or lower ones negated
    ceiling = 1.0 if is_higher else 0.0
    means = [score_of(scores, config) for scores in by_size.values()]
    try:
        curve = fit_curve(sizes, [sign * mean.mean for mean in means if mean], ceiling)
    except FitError as error:
        return {"reason": str(error)}
    # With one seed for all: sizes were asked the same questions, so they move together.
    drawn = [sign * resampled_means(each, NUM_FITS, seed_for(0, "", "fit"), SCORES) for each in by_size.values()]
    resamples = fit_curves(sizes, np.stack(drawn, axis=1), ceiling)
    shown = np.geomspace(sizes[0], 2 * sizes[-1], NUM_CURVE_POINTS)
    tails = [(1 - config.confidence) / 2, (1 + config.confidence) / 2]
    low, high = np.quantile([sign * each.at(shown) for each in resamples], tails, axis=0)
    further = [each.further_images(sizes[-1], POINT) for each in resamples]
    note = "the exponent is at its bound, so the limit is not known from these sizes" if curve.is_at_bound else None
    return {
        "reason": None,
        "limit": sign * curve.limit,
        **_interval("limit", [sign * each.limit for each in resamples], tails),
        "factor": curve.factor if curve.drop else 0.0,
        "exponent": curve.exponent if curve.drop else None,
        "note": note if curve.drop else "no growth: the best curve is a constant",
        "at_size": sizes[-1],
        "further_images": _finite(curve.further_images(sizes[-1], POINT)),
        **_interval("further", further, tails),
        "share_never": float(np.mean(np.isinf(further))),
        "resampled": "questions and seeds" if max(map(len, by_size.values())) > 1 else "questions",
        "line": {
            "sizes": shown.tolist(),
            "scores": (sign * curve.at(shown)).tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
        },
    }


def _interval(name: str, values: Sequence[float], tails: Sequence[float]) -> dict[str, float | None]:
    """Return the ends of the interval as values that occur, as between a number and infinity there is nothing."""
    ordered, last = sorted(values), len(values) - 1
    low, high = ordered[math.floor(last * tails[0])], ordered[math.ceil(last * tails[1])]
    return {f"{name}_low": _finite(low), f"{name}_high": _finite(high)}


def _finite(value: float) -> float | None:
    """Return None for a bound that is not known."""
    return value if math.isfinite(value) else None
