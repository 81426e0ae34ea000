"""Scores by benchmark and metric, and the gain that the page opens with."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from stic_ray.core.config import AnswerMode
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import BASE
from stic_ray.report.formats import label, percent, points

MODES = get_args(AnswerMode)

_UNCORRECTED = " The interval is of this change alone: it is not corrected for being the best of several."


def collect_scores(
    evaluations: Sequence[RunDir], config: Mapping[str, Any], steps: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a table for each benchmark and metric; models in the order of the steps that left them."""
    rows = [row for each in evaluations for row in each.read_json("scores.json") or []]
    models = _ordered([BASE, *steps], [row["model"] for row in rows])
    titles = titles_of((row["benchmark"], row["metric"]) for row in rows)
    benchmarks = [_table(key, title, rows, models) for key, title in titles.items()]
    return {"confidence": (config.get("evaluation") or {}).get("confidence"), "benchmarks": benchmarks}


def titles_of(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return by benchmark and metric a title: the benchmark, and its metric where it has several."""
    known = dict.fromkeys(keys)
    num_metrics = Counter(benchmark for benchmark, _ in known)
    return {key: key[0] if num_metrics[key[0]] == 1 else f"{key[0]}: {label(key[1])}" for key in known}


def _table(
    key: tuple[str, str], title: str, rows: Sequence[Mapping[str, Any]], models: Sequence[str]
) -> dict[str, Any]:
    own = [row for row in rows if (row["benchmark"], row["metric"]) == key]
    found = {(row["model"], row["mode"]): row for row in own}
    modes = _ordered(MODES, [row["mode"] for row in own])
    return {
        "benchmark": key[0],
        "metric": key[1],
        "higher_is_better": own[0]["higher_is_better"],
        "title": title,
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
    columns: dict[str, list[str]] = {}
    rows = [{row["model"]: row["cells"] for row in benchmark["models"]} for benchmark in benchmarks]
    for cells in rows:
        for model in cells:
            scored = [mode for mode, cell in cells[model].items() if cell]
            columns[model] = _ordered(MODES, [*columns.get(model, ()), *scored])
    keys = [(model, mode) for model, modes in columns.items() for mode in modes]
    shown = [[cells.get(model, {}).get(mode) for model, mode in keys] for cells in rows]
    return {"columns": columns, "rows": list(zip(benchmarks, shown, strict=True))}


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
    known = row["low"] is not None and row["high"] is not None
    return f"{row['score']:.2f}" + (f" [{row['low']:.2f}, {row['high']:.2f}]" if known else "")


def headline(scores: Mapping[str, Any], status: str) -> dict[str, Any]:
    """Return a trained model's best change, in the good direction, against the base model answering directly."""
    changes = [
        {**cell, "title": benchmark["title"], "system": f"{label(cell['model'])}, {label(cell['mode'])}"}
        for benchmark in scores["benchmarks"]
        for model in benchmark["models"]
        if model["model"] != BASE
        for cell in model["cells"].values()
        if cell is not None and cell["difference"] is not None
    ]
    if status != "finished":
        return {"best": None, "num_changes": 0, "sentence": f"Not evaluated (evaluation {status})."}
    if not changes:
        return {"best": None, "num_changes": 0, "sentence": "No trained model was compared with the base model."}
    best, sentence = best_change(changes, scores["confidence"])
    return {"best": best, "num_changes": len(changes), "sentence": sentence}


def best_change(
    changes: Sequence[Mapping[str, Any]], confidence: float | None, where: str = ""
) -> tuple[Mapping[str, Any], str]:
    """Return the best change in the good direction, and a sentence about it with its interval.

    A change has the columns of a difference, `higher_is_better`, the `title` of what was scored, and the `system` that
    scored it; `where` says among which changes it is the best.
    """

    def gain(change: Mapping[str, Any]) -> float:
        return change["difference"] if change["higher_is_better"] else -change["difference"]

    best = max(changes, key=gain)
    low, high = best["difference_low"], best["difference_high"]
    interval = f"{percent(confidence).removesuffix('.0')}% interval" if confidence else "interval"
    bounds, caution = f"{interval} not known", ""
    if low is not None and high is not None:
        bounds = f"{interval} {points(low)} to {points(high)}"
        caution = " The interval includes zero." if low <= 0 <= high else _UNCORRECTED if len(changes) > 1 else ""
    opening = "" if gain(best) > 0 else "No gain: "
    direction = "" if best["higher_is_better"] else " (lower is better)"
    which = "the only change" if len(changes) == 1 else f"the best of {len(changes)} changes"
    return best, (
        f"{opening}{points(best['difference'])} points{direction} on {best['title']} with {best['system']} ({bounds}), "
        f"{which}{where} against the base model answering directly.{caution}"
    )
