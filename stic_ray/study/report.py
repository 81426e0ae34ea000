"""Writes the table, report.json and report.html of a study, from what its runs left behind."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from stic_ray.core.errors import RunError
from stic_ray.core.rundir import RunDir
from stic_ray.report.formats import label, number
from stic_ray.report.scores import best_change
from stic_ray.report.write import render_page
from stic_ray.study.analysis import analyse
from stic_ray.study.plots import growth_plot
from stic_ray.study.processes import DONE
from stic_ray.study.record import Record, read_record
from stic_ray.study.results import Result, read_results, study_table, write_table


def write_study(home: RunDir) -> None:
    """Write cells.parquet, cells.csv, report.json and report.html. Raises RunError when there is no study."""
    record = read_record(home)
    if record is None:
        raise RunError(f"No study at '{home.uri}': it has no study.yaml.")
    results = read_results(record, home)
    write_table(home, study_table(results, record.base.evaluation))
    report = collect_study(record, results, home)
    home.write_json("report.json", report)
    home.write_text("report.html", render_study(report))


def collect_study(record: Record, results: Sequence[Result], home: RunDir) -> dict[str, Any]:
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


def render_study(report: Mapping[str, Any]) -> str:
    """Return the page; every text in it is escaped."""
    plots = [
        Markup(growth_plot(measure["title"], measure["base"], measure["curves"], f"growth-{i}"))
        for i, measure in enumerate(report["measures"])
    ]
    return render_page("study_page.html", "study", report=report, plots=plots)


def _measures(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the curves by benchmark and metric, each with the points of all sizes, None where there is none."""
    keys = list(dict.fromkeys((curve["benchmark"], curve["metric"]) for curve in analysis["curves"]))
    bases = {(row["benchmark"], row["metric"]): row for row in analysis["base"]}
    measures = []
    for key in keys:
        curves = [curve for curve in analysis["curves"] if (curve["benchmark"], curve["metric"]) == key]
        is_alone = [benchmark for benchmark, _ in keys].count(key[0]) == 1
        measures.append(
            {
                "benchmark": key[0],
                "metric": key[1],
                "title": key[0] if is_alone else f"{key[0]}: {label(key[1])}",
                "higher_is_better": curves[0]["higher_is_better"],
                "base": bases.get(key),
                "sizes": sorted({point["size"] for curve in curves for point in curve["points"]}),
                "curves": curves,
                "reasons": sorted({curve["fit"]["reason"] for curve in curves if curve["fit"]["reason"]}),
            }
        )
    return measures


def _run(result: Result) -> dict[str, Any]:
    run = result.run
    costs = list(result.costs.values())
    return {
        "name": run.name,
        "is_source": run.is_source,
        "variant": run.variant,
        "size": run.size,
        "seed": run.seed,
        "source": run.source,
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
        {
            **point,
            "title": measure["title"],
            "system": f"{curve['variant']}, {label(curve['model'])}, {label(curve['mode'])}",
        }
        for measure in measures
        for curve in measure["curves"]
        for point in curve["points"]
        if point["difference"] is not None
    ]
    if not changes:
        return "No cell has been compared with the base model yet."
    largest = max(change["size"] for change in changes)
    found = [
        {**change, "system": f"{change['system']} at {number(largest)} images"}
        for change in changes
        if change["size"] == largest
    ]
    return best_change(found, confidence, " at this size")[1]
