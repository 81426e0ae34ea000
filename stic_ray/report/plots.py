"""Plots as inline SVG that takes its colours from the page: training metrics by step, scores with their intervals."""

import html
import io
import re
import warnings
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

from stic_ray.report.formats import label, number, percent, visible

# Drawn in these colours and then renamed: matplotlib knows no CSS variables.
INK, FAINT = "#010203", "#040506"
SERIES = ("#070809", "#0a0b0c", "#0d0e0f", "#101112", "#131415", "#161718")
MARKERS = ("o", "D", "s", "^", "v", "P")
FONT_POINTS = 9
REFERENCE_LINE: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (3, 3))}
"""Of the base model answering directly."""

_VARIABLES = {
    INK: "var(--muted)",
    FAINT: "var(--line)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, 1)},
}
_STYLES = ("-", "--", ":", "-.")
_WIDTH_INCHES = 4.4
_MAX_NAME_CHARACTERS = 24

CHARTS: dict[str, dict[str, str]] = {
    "Loss": {"loss": "loss"},
    "Loss, DPO part": {"loss/dpo": "DPO part"},
    "Loss, regulariser": {"loss/regulariser": "regulariser"},
    "Reward margin": {"rewards/margins": "margin"},
    "Reward accuracy": {"rewards/accuracies": "accuracy"},
    "Rewards": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "Log-probabilities": {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    "KL to the reference, per token": {"kl": "KL"},
    "Gradient norm": {"grad_norm": "norm"},
    "Learning rate": {"learning_rate": "rate"},
    "Seconds per step": {
        "seconds/step": "in all",
        "seconds/data": "data",
        "seconds/forward": "forward",
        "seconds/backward": "backward",
        "seconds/backward_and_optimizer": "backward and optimiser",
        "seconds/optimizer": "optimiser",
    },
    "Tokens per second": {"tokens_per_second": "tokens/s"},
    "Model FLOP utilisation": {"mfu": "MFU"},
    "Peak memory, GiB": {"peak_memory_gib": "GiB"},
}
"""Title -> metric -> its name; beside it is drawn the same of held-out rows, `eval_` METRIC, where it was logged."""
_LIMITS = {"Reward accuracy": (-0.04, 1.04), "Model FLOP utilisation": (0.0, 1.0)}
_OF_PREFERENCES = ("rewards/", "logps/", "loss/", "kl")


def charts_of(curves: dict[str, Any]) -> list[str]:
    """Return the titles of a training's charts: those about preferences only where it logged any such metric."""
    has_preferences = any(key.startswith(_OF_PREFERENCES) for key in curves["metrics"])
    return [each for each in CHARTS if has_preferences or not next(iter(CHARTS[each])).startswith(_OF_PREFERENCES)]


def training_plot(stage: str, title: str, curves: dict[str, Any]) -> str | None:
    """Return a chart as SVG, or None when none of its metrics has a value. A missing value is a gap."""
    own = CHARTS[title]
    held_out = {f"eval_{key}": f"{name}, held out" if len(own) > 1 else "held out" for key, name in own.items()}
    metrics = {key: np.array(values, dtype=np.float64) for key, values in curves["metrics"].items()}
    lines = {key: name for key, name in {**own, **held_out}.items() if not np.isnan(metrics.get(key, np.nan)).all()}
    if not lines:
        return None
    figure = Figure(figsize=(_WIDTH_INCHES, 2.3), layout="constrained")
    axes, summary = axes_in(figure), []
    for (key, name), colour, style in zip(lines.items(), SERIES, cycle(_STYLES)):
        steps, values = np.array(curves["steps"]), metrics[key]
        known = ~np.isnan(values)
        if key in held_out:  # steps without an evaluation are no gap in what evaluations found
            steps, values, known = steps[known], values[known], known[known]
            dots = known
        else:  # between two gaps, where a line alone shows nothing
            dots = known & ~np.append(False, known[:-1]) & ~np.append(known[1:], False)
        axes.plot(steps, values, style, color=colour, linewidth=1.6, label=name, gid=key)
        axes.plot(steps[dots], values[dots], "o", color=colour, markersize=3)
        first, last, num_missing = *values[known][[0, -1]], np.sum(~known)
        missing = f", {num_missing} missing" if num_missing else ""
        summary.append(f"{name}: first {number(first)}, last {number(last)}, {np.sum(known)} points{missing}")
    if title in _LIMITS:
        axes.set_ylim(*_LIMITS[title])
    axes.set_xlabel("step", color=INK, fontsize=FONT_POINTS)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if len(lines) > 1:
        legend(figure)
    return inline(figure, f"{stage}-{title}", f"{title} by step. {'; '.join(summary)}.")


def score_plot(benchmark: dict[str, Any], prefix: str) -> str | None:
    """Return the scores of a benchmark in percent as dots with their intervals; None without any score."""
    models, modes = [row["model"] for row in benchmark["models"]], benchmark["modes"]
    figure = Figure(figsize=(_WIDTH_INCHES, 0.9 + 0.42 * len(models)), layout="constrained")
    axes, summary = axes_in(figure), []
    for i, mode in enumerate(modes):
        offset = 0.13 * (2 * i - len(modes) + 1)
        colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        cells = [(y + offset, row["cells"][mode]) for y, row in enumerate(benchmark["models"])]
        known = [(y, cell) for y, cell in cells if cell is not None and cell["score"] is not None]
        for y, cell in known:
            if (cell["model"], mode) == ("base", "direct"):
                axes.axvline(100 * cell["score"], **REFERENCE_LINE)
            if cell["low"] is not None and cell["high"] is not None:
                axes.plot([100 * cell["low"], 100 * cell["high"]], [y, y], "-", color=colour, linewidth=1.8)
            summary.append(f"{visible(cell['model'])} {label(visible(mode))} {percent(cell['score'])}")
        dots = [100 * cell["score"] for _, cell in known]
        axes.plot(dots, [y for y, _ in known], marker, color=colour, markersize=6, label=short_name(label(mode)))
    if not summary:
        return None
    axes.set_yticks(range(len(models)), [short_name(model) for model in models], parse_math=False)
    axes.set_ylim(len(models) - 0.5, -0.5)
    direction = "" if benchmark["higher_is_better"] else ", lower is better"
    axes.set_xlabel(f"score, %{direction}", color=INK, fontsize=FONT_POINTS)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    legend(figure)
    return inline(
        figure, prefix, f"Scores on {visible(benchmark['title'])}, in percent{direction}: {'; '.join(summary)}."
    )


def axes_in(figure: Figure, place: tuple[int, int, int] = (1, 1, 1), sharey: Axes | None = None) -> Axes:
    """Add axes in the page's style; `place` is (rows, columns, number from 1)."""
    axes = figure.add_subplot(*place, sharey=sharey)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=FONT_POINTS)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def legend(figure: Figure, num_columns: int = 2, **options: Any) -> None:
    """Add a legend above the axes; names are text, not formulas."""
    style: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": FONT_POINTS}
    drawn = figure.legend(loc="outside upper right", ncols=num_columns, **style, **options)
    for text in drawn.get_texts():
        text.set_parse_math(False)


def inline(figure: Figure, prefix: str, description: str) -> str:
    """Return a figure as an <svg> element to be put into HTML, its ids its own and its colours the page's."""
    sink = io.StringIO()
    fixed: dict[RcKeyType, Any] = {"svg.fonttype": "none", "svg.hashsalt": "stic-ray"}
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(fixed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text, in its own fonts
        figure.savefig(sink, format="svg", transparent=True, metadata=no_metadata)
    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # its rule for * would reach the whole page
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    own = re.sub(r"[^a-z0-9]+", "-", prefix.lower()).strip("-")
    svg = re.sub(r'\bid="|(?<=href=")#|(?<=url\()#', lambda match: f"{match[0]}{own}-", svg)
    svg = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], svg)
    view_box = re.search(r'viewBox="[^"]+"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    opening = f'<svg role="img" aria-label="{html.escape(description)}" {view_box[0]}>'
    return re.sub(r"^<svg[^>]*>", lambda _: opening, svg)


def short_name(word: str) -> str:
    """Return a name that the user gave on one line, cut to what fits beside a plot."""
    text = " ".join(visible(word).split())
    return text if len(text) <= _MAX_NAME_CHARACTERS else f"{text[: _MAX_NAME_CHARACTERS - 1]}…"
