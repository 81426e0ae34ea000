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
_FILTERS = ("percent", "points", "number", "duration", "moment", "fact", "label", "yaml_text")
"""Functions of formats.py that the templates use."""


def write_report(run: RunDir) -> None:
    """Write report.json, then report.html: one page that needs no other file and no network.

    Stages that did not run are shown as not run. Raises RunError when there is no such run, OSError when its
    files cannot be read or written.
    """
    report = collect(run)
    without = {
        name: [
            {**each, "items": [{key: item[key] for key in item if key not in _PICTURES} for item in each["items"]]}
            for each in report[name]
        ]
        for name in ("galleries", "candidates")
    }
    run.write_json("report.json", {**report, **without})
    run.write_text("report.html", render(report))


def render(report: dict[str, Any]) -> str:
    """Return the page of what `collect` returned; every text in it is escaped."""
    benchmarks = report["scores"]["benchmarks"]
    training_plots = {
        each["stage"]: [
            (title, _markup(training_plot(each["stage"], title, each["curves"]))) for title in charts_of(each["curves"])
        ]
        for each in report["training"]
        if each["curves"]
    }
    return render_page(
        "page.html",
        report=report,
        overview=overview(benchmarks),
        score_plots=[_markup(score_plot(benchmark, f"scores-{i}")) for i, benchmark in enumerate(benchmarks)],
        training_plots=training_plots,
    )


def render_page(template: str, folder: str = "report", **values: Any) -> str:
    """Return a page from a template in `folder` of the package; it may use the style and macros of this one."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("stic_ray", name) for name in dict.fromkeys((folder, "report"))]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: getattr(formats, name) for name in _FILTERS}, verdict=verdict)
    return environment.get_template(template).render(**values)


def _shown(value: Any) -> Any:
    if value is None:
        return formats.UNKNOWN
    return formats.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markup(svg: str | None) -> Markup | None:
    return Markup(svg) if svg else None
