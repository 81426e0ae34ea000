"""What the cells say together: means over seeds, gains with intervals, fitted curves and the price of a point."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stic_ray.core.config import EvaluationConfig
from stic_ray.core.randomness import seed_for
from stic_ray.core.steps import BASE
from stic_ray.method.scaling import Curve, FitError, Floats, fit_curve, fit_curves
from stic_ray.method.statistics import DIFFERENCES, SCORES, Scores, columns, differences, resampled_means, score_of
from stic_ray.study.processes import DONE
from stic_ray.study.results import Cost, Result, Series
from stic_ray.study.table import DIRECT, base_scores

POINT = 0.01
"""A point of score."""
NUM_FITS = 400
"""Resamples behind the interval of a fit."""
NUM_CURVE_POINTS = 60


@dataclass(frozen=True)
class _Seen:
    """One cell's scores in one series."""

    seed: int
    scores: Scores
    differences: Scores
    """To the base model answering directly."""
    cost: Cost


def analyse(results: Sequence[Result], config: EvaluationConfig) -> dict[str, Any]:
    """Return curves (one per variant, model, mode, benchmark and metric) and base scores in JSON's own types."""
    higher: dict[tuple[str, str], bool] = {}
    for result in results:
        higher |= result.higher_is_better
    groups = _grouped(results)
    return {
        "confidence": config.confidence,
        "base": _base(results, config),
        "curves": [_curve(*key, by_size, higher, config) for key, by_size in groups.items()],
    }


def _grouped(results: Sequence[Result]) -> dict[tuple[str, Series], dict[int, list[_Seen]]]:
    """Return the cells of each variant and series by size, sizes rising, models and modes in the pipeline's order."""
    bases = base_scores(results)
    groups: dict[tuple[str, Series], dict[int, list[_Seen]]] = {}
    for result in sorted(results, key=lambda result: (result.run.size, result.run.seed)):
        for series, scores in result.scores.items():
            if result.run.variant == BASE:
                continue
            measure = (series.benchmark, series.metric)
            apart = differences(scores, bases.get(result.run.source, {}).get(measure, {}))
            seen = _Seen(result.run.seed, scores, apart, result.costs[series.model])
            groups.setdefault((result.run.variant, series), {}).setdefault(result.run.size, []).append(seen)
    variants = list(dict.fromkeys(result.run.variant for result in results))
    models = list(dict.fromkeys(series.model for result in results for series in result.scores))

    def order(key: tuple[str, Series]) -> tuple[Any, ...]:
        variant, series = key
        return (
            series.benchmark,
            series.metric,
            variants.index(variant),
            models.index(series.model),
            series.mode != DIRECT,
        )

    return {key: groups[key] for key in sorted(groups, key=order)}


def _base(results: Sequence[Result], config: EvaluationConfig) -> list[dict[str, Any]]:
    """Return the base model's scores answering directly, over the seeds of the first source of each."""
    first: dict[int, Result] = {}
    for result in results:
        if result.run.variant == BASE and result.status == DONE:
            first.setdefault(result.run.seed, result)
    bases = base_scores(list(first.values()))
    measures = dict.fromkeys(measure for scores in bases.values() for measure in scores)
    rows = []
    for benchmark, metric in measures:
        own = [scores[benchmark, metric] for scores in bases.values() if (benchmark, metric) in scores]
        rows.append({"benchmark": benchmark, "metric": metric, **columns(score_of(own, config), "score", "")})
    return rows


def _curve(
    variant: str,
    series: Series,
    by_size: Mapping[int, list[_Seen]],
    higher: Mapping[tuple[str, str], bool],
    config: EvaluationConfig,
) -> dict[str, Any]:
    is_higher = higher.get((series.benchmark, series.metric), True)
    return {
        "variant": variant,
        "model": series.model,
        "mode": series.mode,
        "benchmark": series.benchmark,
        "metric": series.metric,
        "higher_is_better": is_higher,
        "points": [_point(size, seen, is_higher, config) for size, seen in by_size.items()],
        "fit": _fit({size: [each.scores for each in seen] for size, seen in by_size.items()}, is_higher, config),
    }


def _point(size: int, seen: Sequence[_Seen], is_higher: bool, config: EvaluationConfig) -> dict[str, Any]:
    found = score_of([each.differences for each in seen], config, span=DIFFERENCES)
    apart = columns(found, "difference", "difference_")
    core_hours = float(np.mean([each.cost.core_hours for each in seen]))
    gpu_hours = float(np.mean([each.cost.gpu_hours for each in seen]))
    return {
        "size": size,
        "seeds": [each.seed for each in seen],
        **columns(score_of([each.scores for each in seen], config), "score", ""),
        "spread": spread([each.scores for each in seen]),
        **apart,
        "higher_is_better": is_higher,
        "core_hours": core_hours,
        "gpu_hours": gpu_hours,
        "hours_per_point": _per_point(gpu_hours or core_hours, apart, is_higher),
        "hours_are": "GPU-hours" if gpu_hours else "core-hours",
    }


def spread(by_seed: Sequence[Scores]) -> float | None:
    """Return the standard deviation of the means over seeds; None for one seed."""
    means = [float(np.mean(list(scores.values()))) for scores in by_seed]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def _per_point(hours: float, apart: Mapping[str, float | None], is_higher: bool) -> dict[str, float | None]:
    """Return hours per point gained, at the gain and at both ends of its interval; None where nothing is gained."""
    sign = 1 if is_higher else -1
    ends = (apart["difference_low"], apart["difference_high"])
    least, most = ends if is_higher else ends[::-1]

    def price(value: float | None) -> float | None:
        return hours * POINT / (sign * value) if value is not None and sign * value > 0 else None

    return {"value": price(apart["difference"]), "low": price(most), "high": price(least)}


def _fit(by_size: Mapping[int, list[Scores]], is_higher: bool, config: EvaluationConfig) -> dict[str, Any]:
    """Return the fitted curve with intervals, or the reason why there is none."""
    sizes, sign = list(by_size), 1 if is_higher else -1
    ceiling = 1.0 if is_higher else 0.0
    means = [score_of(scores, config) for scores in by_size.values()]
    try:
        curve = fit_curve(sizes, [sign * mean.mean for mean in means if mean], ceiling)
    except FitError as error:
        return {"reason": str(error)}
    # With one seed for all: sizes were asked the same questions, so they move together.
    seed, num_seeds = seed_for(0, "", "fit"), max(map(len, by_size.values()))
    drawn = [sign * resampled_means(scores, NUM_FITS, seed, SCORES) for scores in by_size.values()]
    resamples = fit_curves(sizes, np.stack(drawn, axis=1), ceiling)
    shown = np.geomspace(sizes[0], 2 * sizes[-1], NUM_CURVE_POINTS)
    band = _ends(np.stack([each.at(shown) for each in resamples]), config.confidence)
    further = [each.further_images(sizes[-1], POINT) for each in resamples]
    return {
        "reason": None,
        "limit": sign * curve.limit,
        **dict(
            zip(("limit_low", "limit_high"), _bounds([sign * each.limit for each in resamples], config), strict=True)
        ),
        "factor": curve.factor if curve.drop else 0.0,
        "exponent": curve.exponent if curve.drop else None,
        "note": _note(curve),
        "at_size": sizes[-1],
        "further_images": _finite(curve.further_images(sizes[-1], POINT)),
        **dict(zip(("further_low", "further_high"), _bounds(further, config), strict=True)),
        "share_never": float(np.mean(np.isinf(further))),
        "resampled": "questions and seeds" if num_seeds > 1 else "questions",
        "line": {
            "sizes": shown.tolist(),
            "scores": (sign * curve.at(shown)).tolist(),
            "low": (sign * band[0 if is_higher else 1]).tolist(),
            "high": (sign * band[1 if is_higher else 0]).tolist(),
        },
    }


def _note(curve: Curve) -> str | None:
    if not curve.drop:
        return "no growth: the best curve is a constant"
    if curve.is_at_bound:
        return "the exponent is at its bound, so the limit is not known from these sizes"
    return None


def _ends(values: Floats, confidence: float) -> Floats:
    return np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)


def _bounds(values: Sequence[float], config: EvaluationConfig) -> tuple[float | None, float | None]:
    """Return the ends of the interval as values that occur, as between a number and infinity there is nothing."""
    ordered = sorted(values)
    last = len(ordered) - 1
    low = ordered[math.floor(last * (1 - config.confidence) / 2)]
    high = ordered[math.ceil(last * (1 + config.confidence) / 2)]
    return _finite(low), _finite(high)


def _finite(value: float) -> float | None:
    """Return None for a bound that is not known."""
    return value if math.isfinite(value) else None
