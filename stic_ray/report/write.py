"""Writes report.json and report.html into the run directory."""

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stic_ray.core.rundir import RunDir
from stic_ray.report import formats
from stic_ray.report.collect import collect
from stic_ray.report.plots import charts_of, score_plot, training_plot
from stic_ray.report.scores import overview, verdict

_PICTURES = ("clean_image", "corrupted_image")


def write_report(run: RunDir) -> None:
    """Write report.json, then report.html: one page that needs no other file and no network.

    Stages that did not run are shown as not run. Raises RunError when there is no such run, OSError when its
    files cannot be read or written.
    """
    report = collect(run)
    run.write_json("report.json", without_pictures(report))
    run.write_text("report.html", render(report))


def without_pictures(report: dict[str, Any]) -> dict[str, Any]:
    """Return what `collect` returned without the pictures of the galleries."""
    galleries = [
        {
            **gallery,
            "items": [{key: value for key, value in item.items() if key not in _PICTURES} for item in gallery["items"]],
        }
        for gallery in report["galleries"]
    ]
    return {**report, "galleries": galleries}


def render(report: dict[str, Any]) -> str:
    """Return the page of what `collect` returned; every text in it is escaped."""
    return render_page(
        "page.html",
        report=report,
        overview=overview(report["scores"]["benchmarks"]),
        score_plots=_score_plots(report),
        training_plots=_training_plots(report),
    )


def render_page(template: str, folder: str = "report", **values: Any) -> str:
    """Return a page from a template in `folder` of the package; it may use the style and macros of this one."""
    loaders = [PackageLoader("stic_ray", name) for name in dict.fromkeys((folder, "report"))]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = (
        formats.percent,
        formats.points,
        formats.number,
        formats.duration,
        formats.moment,
        formats.fact,
        formats.label,
        formats.yaml_text,
        verdict,
    )
    environment.filters.update({word.__name__: word for word in words})
    return environment.get_template(template).render(**values)


def _shown(value: Any) -> Any:
    if value is None:
        return formats.UNKNOWN
    return formats.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _score_plots(report: dict[str, Any]) -> list[Markup | None]:
    plots = [score_plot(benchmark, f"scores-{i}") for i, benchmark in enumerate(report["scores"]["benchmarks"])]
    return [Markup(svg) if svg else None for svg in plots]


def _training_plots(report: dict[str, Any]) -> dict[str, list[tuple[str, Markup | None]]]:
    """Return for each training stage the titles of its charts, and the plots of those that have values."""
    plots = {}
    for training in report["training"]:
        stage, curves = training["stage"], training["curves"]
        drawn = [(chart.title, training_plot(stage, chart, curves)) for chart in charts_of(curves)] if curves else []
        plots[stage] = [(title, Markup(svg) if svg else None) for title, svg in drawn]
    return plots
