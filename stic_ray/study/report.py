"""Writes the table, report.json and report.html of a study, from what its runs left behind."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from stic_ray.core.errors import RunError
from stic_ray.core.rundir import RunDir
from stic_ray.report import plots
from stic_ray.report.formats import label, number, percent, visible
from stic_ray.report.scores import best_change, titles_of
from stic_ray.report.write import render_page
from stic_ray.study.analysis import analyse
from stic_ray.study.plan import Study, read_record
from stic_ray.study.processes import DONE
from stic_ray.study.results import Result, read_results, study_table, write_table

_STYLES = ("-", (0, (4, 2)), ":")
"""Of models, the last one first."""
_WIDTH_INCHES, _HEIGHT_INCHES = 8.8, 3.6
_APART = 1.035
"""Factor between the places of two lines at one size, so that their intervals do not hide each other."""


def write_study(home: RunDir) -> None:
    """Write cells.parquet, cells.csv, report.json and report.html. Raises RunError when there is no study."""
    record = read_record(home)
    if record is None:
        raise RunError(f"No study at '{home.uri}': it has no study.yaml.")
    results = read_results(record, home)
    write_table(home, study_table(results, record.base.evaluation))
    report = collect_study(record, results, home)
    drawn = [Markup(growth_plot(measure, f"growth-{i}")) for i, measure in enumerate(report["measures"])]
    home.write_json("report.json", report)
    home.write_text("report.html", render_page("study_page.html", "study", report=report, plots=drawn))


def collect_study(record: Study, results: Sequence[Result], home: RunDir) -> dict[str, Any]:
    """Return all that the page shows, in JSON's own types."""
    analysis = analyse(results, record.base.evaluation)
    measures = _measures(analysis)
    return {
        "name": home.location.name,
        "uri": home.uri,
        "headline": _headline(measures, analysis["confidence"]),
        "confidence": analysis["confidence"],
        "measures": measures,
        "runs": [_run(result) for result in results],
        "asked": {
            "sizes": list(record.sizes),
            "seeds": list(record.seeds),
            "variants": {name: dict(overrides) for name, overrides in record.variants.items()},
            **record.facts,
            "config": record.base.model_dump(mode="json"),
        },
    }


def _measures(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the curves by benchmark and metric, each with the points of all sizes, None where there is none."""
    bases = {(row["benchmark"], row["metric"]): row for row in analysis["base"]}
    measures = []
    for key, title in titles_of((curve["benchmark"], curve["metric"]) for curve in analysis["curves"]).items():
        curves = [curve for curve in analysis["curves"] if (curve["benchmark"], curve["metric"]) == key]
        measures.append(
            {
                "benchmark": key[0],
                "metric": key[1],
                "title": title,
                "higher_is_better": curves[0]["higher_is_better"],
                "base": bases.get(key),
                "sizes": sorted({point["size"] for curve in curves for point in curve["points"]}),
                "curves": curves,
                "reasons": sorted({curve["fit"]["reason"] for curve in curves if curve["fit"]["reason"]}),
            }
        )
    return measures


def _run(result: Result) -> dict[str, Any]:
    run, costs = result.run, list(result.costs.values())
    return {
        "name": run.name,
        "is_source": run.is_source,
        **asdict(run),
        "status": result.status,
        "error": result.error,
        "num_pairs": next((cost.num_pairs for cost in costs if cost.num_pairs is not None), None),
        "core_hours": max((cost.core_hours for cost in costs), default=None),
        "gpu_hours": max((cost.gpu_hours for cost in costs), default=None),
        "is_done": result.status == DONE,
    }


def _headline(measures: Sequence[Mapping[str, Any]], confidence: float) -> str:
    """Return a sentence about the best change in the good direction at the largest size that has any."""
    changes = [
        (curve, {**point, "title": measure["title"]})
        for measure in measures
        for curve in measure["curves"]
        for point in curve["points"]
        if point["difference"] is not None
    ]
    if not changes:
        return "No cell has been compared with the base model yet."
    largest = max(change["size"] for _, change in changes)
    found = [
        {**change, "system": f"{_named(curve)} at {number(largest)} images"}
        for curve, change in changes
        if change["size"] == largest
    ]
    return best_change(found, confidence, " at this size")[1]


def _named(curve: Mapping[str, Any]) -> str:
    return f"{curve['variant']}, {label(curve['model'])}, {label(curve['mode'])}"


def growth_plot(measure: Mapping[str, Any], prefix: str) -> str:
    """Return score against pool size, a panel per mode, with fits and the base model: colour is variant, dash model."""
    curves, sizes, base = measure["curves"], measure["sizes"], measure["base"]
    modes, variants, models = (
        list(dict.fromkeys(each[key] for each in curves)) for key in ("mode", "variant", "model")
    )
    dashes = dict(zip(reversed(models), cycle(_STYLES)))
    looks: dict[tuple[str, str], dict[str, Any]] = {}
    for variant, model in dict.fromkeys((curve["variant"], curve["model"]) for curve in curves):
        i = variants.index(variant) % len(plots.SERIES)
        looks[variant, model] = {"color": plots.SERIES[i], "marker": plots.MARKERS[i], "linestyle": dashes[model]}
    height_inches = _HEIGHT_INCHES + 0.2 * ((len(looks) + 3) // 4)
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    first: Axes | None = None
    for i, mode in enumerate(modes):
        axes = plots.axes_in(figure, (1, len(modes), i + 1), sharey=first)
        first = first or axes
        if base and base["score"] is not None:
            axes.axhline(100 * base["score"], **plots.REFERENCE_LINE)
            if base["low"] is not None and base["high"] is not None:
                axes.axhspan(100 * base["low"], 100 * base["high"], color=plots.INK, alpha=0.08, linewidth=0)
        for curve in (curve for curve in curves if curve["mode"] == mode):
            key = curve["variant"], curve["model"]
            _draw_curve(axes, curve, looks[key], _APART ** (list(looks).index(key) - (len(looks) - 1) / 2))
        _set_axes(axes, label(mode), sizes, is_first=i == 0)
    style = {"markersize": 5, "linewidth": 1.5}
    handles = [Line2D([], [], label=f"{plots.short_name(v)}, {m}", **looks[v, m], **style) for v, m in looks]
    if base:
        handles.append(Line2D([], [], label="base, direct", **plots.REFERENCE_LINE))
    plots.legend(figure, min(len(handles), 4), handles=handles, handlelength=3.5)
    return plots.inline(
        figure, prefix, f"{visible(measure['title'])} by pool size. {'; '.join(map(_described, curves))}."
    )


def _draw_curve(axes: Axes, curve: Mapping[str, Any], look: Mapping[str, Any], shift: float) -> None:
    colour, marker, dash = look["color"], look["marker"], look["linestyle"]
    known = [point for point in curve["points"] if point["score"] is not None]
    for point in known:
        if point["low"] is not None and point["high"] is not None:
            ends = [100 * point["low"], 100 * point["high"]]
            axes.plot([point["size"] * shift] * 2, ends, "-", color=colour, linewidth=1.3)
    places, scores = [point["size"] * shift for point in known], [100 * point["score"] for point in known]
    axes.plot(places, scores, marker, color=colour, markersize=5)
    if curve["fit"]["reason"] is not None:  # no curve: a thin line from point to point
        axes.plot(places, scores, linestyle=dash, color=colour, linewidth=0.9)
        return
    line = curve["fit"]["line"]
    scores, low, high = ([100 * y for y in line[key]] for key in ("scores", "low", "high"))
    axes.plot(line["sizes"], scores, linestyle=dash, color=colour, linewidth=1.5)
    axes.fill_between(line["sizes"], low, high, color=colour, alpha=0.1, linewidth=0)


def _set_axes(axes: Axes, title: str, sizes: Sequence[int], *, is_first: bool) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(map(float, sizes))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(list(sizes), [number(size) for size in sizes], parse_math=False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.set_title(plots.short_name(title), color=plots.INK, fontsize=plots.FONT_POINTS, parse_math=False)
    axes.set_xlabel("images in the pool", color=plots.INK, fontsize=plots.FONT_POINTS)
    if is_first:
        axes.set_ylabel("score, %", color=plots.INK, fontsize=plots.FONT_POINTS)
    else:
        axes.tick_params(labelleft=False)


def _described(curve: Mapping[str, Any]) -> str:
    points = ", ".join(f"{percent(point['score'])} at {number(point['size'])}" for point in curve["points"])
    return f"{visible(curve['variant'])} {curve['model']} {label(curve['mode'])}: {points}"
