"""Scores by benchmark and metric, and the gain that the page opens with."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from stic_ray.core.config import AnswerMode
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import BASE
from stic_ray.report.formats import label, percent, points

MODES = get_args(AnswerMode)

UNCORRECTED = " The interval is of this change alone: it is not corrected for being the best of several."
_SCORE_KEYS = ("score", "low", "high", "difference", "difference_low", "difference_high")


def collect_scores(
    evaluations: Sequence[RunDir], config: Mapping[str, Any], steps: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a table for each benchmark and metric; models in the order of the steps that left them."""
    rows = [row for each in evaluations for row in each.read_json("scores.json") or []]
    models = _ordered([BASE, *steps], [row["model"] for row in rows])
    keys = list(dict.fromkeys((row["benchmark"], row["metric"]) for row in rows))
    benchmarks = [_table(key, rows, models, is_alone=[name for name, _ in keys].count(key[0]) == 1) for key in keys]
    return {"confidence": (config.get("evaluation") or {}).get("confidence"), "benchmarks": benchmarks}


def _table(
    key: tuple[str, str], rows: Sequence[Mapping[str, Any]], models: Sequence[str], *, is_alone: bool
) -> dict[str, Any]:
    benchmark, metric = key
    own = [row for row in rows if (row["benchmark"], row["metric"]) == key]
    found = {(row["model"], row["mode"]): {**dict.fromkeys(_SCORE_KEYS), **row} for row in own}
    modes = _ordered(MODES, [row["mode"] for row in own])
    return {
        "benchmark": benchmark,
        "metric": metric,
        "higher_is_better": own[0]["higher_is_better"],
        "title": benchmark if is_alone else f"{benchmark}: {label(metric)}",
        "num_questions": sorted({row["num_questions"] for row in own}),
        "modes": modes,
        "models": [
            {"model": model, "cells": {mode: found.get((model, mode)) for mode in modes}}
            for model in _ordered(models, [row["model"] for row in own])
        ],
    }


def _ordered(first: Sequence[str], present: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys([*first, *present]) if name in present]


def overview(benchmarks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return all scores in one table, a column for each model and mode; None where one table shows them anyway."""
    if len(benchmarks) < 2:
        return None
    models = list(dict.fromkeys(row["model"] for benchmark in benchmarks for row in benchmark["models"]))
    cells = [{row["model"]: row["cells"] for row in benchmark["models"]} for benchmark in benchmarks]
    columns = {
        model: _ordered(MODES, [mode for each in cells for mode, cell in each.get(model, {}).items() if cell])
        for model in models
    }
    return {
        "columns": columns,
        "rows": [
            (benchmark, [each.get(model, {}).get(mode) for model in models for mode in columns[model]])
            for benchmark, each in zip(benchmarks, cells, strict=True)
        ],
    }


def verdict(cell: Mapping[str, Any]) -> str:
    """Return "gain" or "loss" where the interval of the difference lies on one side of zero, else ""."""
    low, high = cell["difference_low"], cell["difference_high"]
    is_up, is_down = low is not None and low > 0, high is not None and high < 0
    if not is_up and not is_down:
        return ""
    return "gain" if is_up == cell["higher_is_better"] else "loss"


def in_words(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line per benchmark and metric: the base model against the one trained last, each asked directly.

    The last word is about their difference, question by question, whose interval is narrower than the two that stand
    there; `scores` are rows of scores.json.
    """
    lines = []
    for key in dict.fromkeys((row["benchmark"], row["metric"]) for row in scores):
        models = {r["model"]: r for r in scores if (r["benchmark"], r["metric"]) == key and r["mode"] == MODES[0]}
        if BASE not in models or len(models) < 2:
            continue
        trained = list(models)[-1]
        word = {"gain": "better", "loss": "worse", "": "no clear difference"}[verdict(models[trained])]
        before, after = (f"{name} {_with_interval(models[name])}" for name in (BASE, trained))
        better = "" if models[trained]["higher_is_better"] else " (lower is better)"
        lines.append(f"{key[0]} {label(key[1])}{better}: {before} -> {after}: {word}")
    return lines


def _with_interval(row: Mapping[str, Any]) -> str:
    known = _is_known(row["low"]) and _is_known(row["high"])
    return f"{row['score']:.2f}" + (f" [{row['low']:.2f}, {row['high']:.2f}]" if known else "")


def headline(scores: Mapping[str, Any], status: str) -> dict[str, Any]:
    """Return a trained model's best change, in the good direction, against the base model answering directly."""
    if status != "finished":
        return {"best": None, "num_changes": 0, "sentence": f"Not evaluated (evaluation {status})."}
    trained = [
        {**cell, "title": benchmark["title"]}
        for benchmark in scores["benchmarks"]
        for model in benchmark["models"]
        if model["model"] != BASE
        for cell in model["cells"].values()
        if cell is not None and _is_known(cell["difference"])
    ]
    if not trained:
        return {
            "best": None,
            "num_changes": 0,
            "sentence": "No trained model was compared with the base model.",
        }
    best = max(trained, key=_gain)
    return {
        "best": best,
        "num_changes": len(trained),
        "sentence": _sentence(best, len(trained), scores["confidence"]),
    }


def _gain(cell: Mapping[str, Any]) -> float:
    return cell["difference"] if cell["higher_is_better"] else -cell["difference"]


def _sentence(best: Mapping[str, Any], num_changes: int, confidence: float | None) -> str:
    low, high = best["difference_low"], best["difference_high"]
    interval = f"{percent(confidence).removesuffix('.0')}% interval" if confidence else "interval"
    if _is_known(low) and _is_known(high):
        bounds = f"{interval} {points(low)} to {points(high)}"
        zero = " The interval includes zero." if low <= 0 <= high else UNCORRECTED if num_changes > 1 else ""
    else:
        bounds, zero = f"{interval} not known", ""
    opening = "" if _gain(best) > 0 else "No gain: "
    direction = "" if best["higher_is_better"] else " (lower is better)"
    which = "the only change" if num_changes == 1 else f"the best of {num_changes} changes"
    return (
        f"{opening}{points(best['difference'])} points{direction} on {best['title']} with {label(best['model'])}, "
        f"{label(best['mode'])} ({bounds}), {which} against the base model answering directly.{zero}"
    )


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
