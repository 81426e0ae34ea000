"""The plots of a run's report: training metrics by step, and scores with their intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib.ticker import MaxNLocator

from stic_ray.report.drawing import FONT_POINTS, INK, MARKERS, SERIES, axes_in, inline, legend, new_figure, short_name
from stic_ray.report.formats import label, number, percent, visible

_STYLES = ("-", "--", ":", "-.")
_HELD_OUT = "eval_"
"""Begins the metrics of evaluations, which are points between many steps without any."""


@dataclass(frozen=True)
class Chart:
    """One plot of training metrics by step: its title and the metrics in it, by key and name."""

    title: str
    metrics: tuple[tuple[str, str], ...]
    limits: tuple[float, float] | None = None


_SECONDS = Chart(
    "Seconds per step",
    (
        ("seconds/step", "in all"),
        ("seconds/data", "data"),
        ("seconds/forward", "forward"),
        ("seconds/backward", "backward"),
        ("seconds/backward_and_optimizer", "backward and optimiser"),
        ("seconds/optimizer", "optimiser"),
    ),
)
CHARTS = (
    Chart("Loss", (("loss", "loss"), ("eval_loss", "held out"))),
    Chart("Loss, DPO part", (("loss/dpo", "DPO part"), ("eval_loss/dpo", "held out"))),
    Chart("Loss, regulariser", (("loss/regulariser", "regulariser"), ("eval_loss/regulariser", "held out"))),
    Chart("Reward margin", (("rewards/margins", "margin"), ("eval_rewards/margins", "held out"))),
    Chart(
        "Reward accuracy",
        (("rewards/accuracies", "accuracy"), ("eval_rewards/accuracies", "held out")),
        limits=(-0.04, 1.04),
    ),
    Chart(
        "Rewards",
        (
            ("rewards/chosen", "chosen"),
            ("rewards/rejected", "rejected"),
            ("eval_rewards/chosen", "chosen, held out"),
            ("eval_rewards/rejected", "rejected, held out"),
        ),
    ),
    Chart(
        "Log-probabilities",
        (
            ("logps/chosen", "chosen"),
            ("logps/rejected", "rejected"),
            ("eval_logps/chosen", "chosen, held out"),
            ("eval_logps/rejected", "rejected, held out"),
        ),
    ),
    Chart("KL to the reference, per token", (("kl", "KL"), ("eval_kl", "held out"))),
    Chart("Gradient norm", (("grad_norm", "norm"),)),
    Chart("Learning rate", (("learning_rate", "rate"),)),
    _SECONDS,
    Chart("Tokens per second", (("tokens_per_second", "tokens/s"),)),
    Chart("Model FLOP utilisation", (("mfu", "MFU"),), limits=(0.0, 1.0)),
    Chart("Peak memory, GiB", (("peak_memory_gib", "GiB"),)),
)
"""Of every training; one without such metrics lacks the chart."""
_OF_PREFERENCES = ("rewards/", "logps/", "loss/", "kl")


def charts_of(curves: dict[str, Any]) -> list[Chart]:
    """Return the charts of a training: those about preferences only where it has logged any such metric."""
    has_preferences = any(key.startswith(_OF_PREFERENCES) for key in curves["metrics"])
    return [each for each in CHARTS if has_preferences or not each.metrics[0][0].startswith(_OF_PREFERENCES)]


def training_plot(stage: str, chart: Chart, curves: dict[str, Any]) -> str | None:
    """Return a chart as SVG, or None when none of its metrics has a value. A missing value is a gap."""
    lines = [(key, name) for key, name in chart.metrics if _present(curves["metrics"].get(key, ()))]
    if not lines:
        return None
    figure = new_figure(height_inches=2.3)
    axes = axes_in(figure)
    for (key, name), colour, style in zip(lines, SERIES, cycle(_STYLES)):
        steps, values = _points(key, curves)
        alone = range(len(values)) if key.startswith(_HELD_OUT) else list(_isolated(values))
        drawn = [float("nan") if value is None else value for value in values]
        dots = [steps[i] for i in alone], [drawn[i] for i in alone]
        axes.plot(steps, drawn, style, color=colour, linewidth=1.6, label=name, gid=key)
        axes.plot(*dots, "o", color=colour, markersize=3)
    if chart.limits:
        axes.set_ylim(*chart.limits)
    axes.set_xlabel("step", color=INK, fontsize=FONT_POINTS)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if len(lines) > 1:
        legend(figure)
    summary = "; ".join(_described(name, _points(key, curves)[1]) for key, name in lines)
    return inline(figure, f"{stage}-{chart.title}", f"{chart.title} by step. {summary}.")


def score_plot(benchmark: dict[str, Any], prefix: str) -> str | None:
    """Return the scores of a benchmark in percent as dots with their intervals; None without any score."""
    models, modes = [row["model"] for row in benchmark["models"]], benchmark["modes"]
    figure = new_figure(height_inches=0.9 + 0.42 * len(models))
    axes = axes_in(figure)
    said = []
    reference = [row["cells"].get("direct") for row in benchmark["models"] if row["model"] == "base"]
    if reference and reference[0] is not None and reference[0]["score"] is not None:
        axes.axvline(100 * reference[0]["score"], color=INK, linewidth=0.9, linestyle=(0, (3, 3)))
    for i, mode in enumerate(modes):
        offset = 0.13 * (2 * i - len(modes) + 1)
        colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        cells = [(y + offset, row["cells"][mode]) for y, row in enumerate(benchmark["models"])]
        known = [(y, cell) for y, cell in cells if cell is not None and cell["score"] is not None]
        for y, cell in known:
            said.append(_described_score(cell))
            if cell["low"] is not None and cell["high"] is not None:
                axes.plot([100 * cell["low"], 100 * cell["high"]], [y, y], "-", color=colour, linewidth=1.8)
        dots = [100 * cell["score"] for _, cell in known]
        axes.plot(dots, [y for y, _ in known], marker, color=colour, markersize=6, label=short_name(label(mode)))
    if not said:
        return None
    axes.set_yticks(range(len(models)), [short_name(model) for model in models], parse_math=False)
    axes.set_ylim(len(models) - 0.5, -0.5)
    direction = "" if benchmark["higher_is_better"] else ", lower is better"
    axes.set_xlabel(f"score, %{direction}", color=INK, fontsize=FONT_POINTS)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    legend(figure)
    summary = f"Scores on {visible(benchmark['title'])}, in percent{direction}: {'; '.join(said)}."
    return inline(figure, prefix, summary)


def _points(key: str, curves: dict[str, Any]) -> tuple[Sequence[int], Sequence[float | None]]:
    """Return steps and values of a metric; steps without an evaluation are no gap in what evaluations found."""
    steps, values = curves["steps"], curves["metrics"][key]
    if not key.startswith(_HELD_OUT):
        return steps, values
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    return [step for step, _ in known], [value for _, value in known]


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _isolated(values: Sequence[float | None]) -> Iterator[int]:
    """Yield the places of values between two gaps, which a line alone would not show."""
    for i, value in enumerate(values):
        before = values[i - 1] if i > 0 else None
        after = values[i + 1] if i + 1 < len(values) else None
        if value is not None and before is None and after is None:
            yield i


def _described(name: str, values: Sequence[float | None]) -> str:
    present = _present(values)
    gaps = len(values) - len(present)
    missing = f", {gaps} missing" if gaps else ""
    return f"{name}: first {number(present[0])}, last {number(present[-1])}, {len(present)} points{missing}"


def _described_score(cell: dict[str, Any]) -> str:
    return f"{visible(cell['model'])} {label(visible(cell['mode']))} {percent(cell['score'])}"
