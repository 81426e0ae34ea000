"""The plots of a study: score against pool size, a panel per mode, with fitted curves and the base model's band."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from stic_ray.report.drawing import (
    FAINT,
    FONT_POINTS,
    INK,
    MARKERS,
    SERIES,
    axes_in,
    inline,
    legend,
    new_figure,
    short_name,
)
from stic_ray.report.formats import label, number, percent, visible

_STYLES = ("-", (0, (4, 2)), ":")
"""Of models, the last one first."""
_WIDTH_INCHES = 8.8
_HEIGHT_INCHES = 3.6
_APART = 1.035
"""Factor between the places of two lines at one size, so that their intervals do not hide each other."""


def growth_plot(title: str, base: Mapping[str, Any] | None, curves: Sequence[Mapping[str, Any]], prefix: str) -> str:
    """Return score against pool size for the curves of one benchmark and metric: colour is variant, dash is model."""
    modes = list(dict.fromkeys(curve["mode"] for curve in curves))
    variants = list(dict.fromkeys(curve["variant"] for curve in curves))
    sizes = sorted({point["size"] for curve in curves for point in curve["points"]})
    lines = list(dict.fromkeys((curve["variant"], curve["model"]) for curve in curves))
    dashes = dict(zip(reversed(list(dict.fromkeys(model for _, model in lines))), cycle(_STYLES)))
    figure = new_figure(_HEIGHT_INCHES + 0.2 * ((len(lines) + 3) // 4), _WIDTH_INCHES)
    first: Axes | None = None
    for i, mode in enumerate(modes):
        axes = axes_in(figure, (1, len(modes), i + 1), sharey=first)
        first = first or axes
        _draw_base(axes, base)
        for curve in (curve for curve in curves if curve["mode"] == mode):
            place = lines.index((curve["variant"], curve["model"])) - (len(lines) - 1) / 2
            _draw_curve(axes, curve, variants.index(curve["variant"]), dashes[curve["model"]], _APART**place)
        _set_axes(axes, label(mode), sizes, is_first=i == 0)
    handles = [_handle(variant, model, variants.index(variant), dashes[model]) for variant, model in lines]
    if base:
        handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (3, 3)), label="base, direct"))
    legend(figure, min(len(handles), 4), handles=handles, handlelength=3.5)
    return inline(figure, prefix, f"{visible(title)} by pool size. {'; '.join(map(_described, curves))}.")


def _draw_base(axes: Axes, base: Mapping[str, Any] | None) -> None:
    if base is None or base["score"] is None:
        return
    axes.axhline(100 * base["score"], color=INK, linewidth=0.9, linestyle=(0, (3, 3)))
    if base["low"] is not None and base["high"] is not None:
        axes.axhspan(100 * base["low"], 100 * base["high"], color=INK, alpha=0.08, linewidth=0)


def _draw_curve(axes: Axes, curve: Mapping[str, Any], number_of_variant: int, dash: Any, shift: float) -> None:
    colour, marker, style = _look(number_of_variant, dash)
    known = [point for point in curve["points"] if point["score"] is not None]
    for point in (point for point in known if point["low"] is not None and point["high"] is not None):
        ends = [100 * point["low"], 100 * point["high"]]
        axes.plot([point["size"] * shift] * 2, ends, "-", color=colour, linewidth=1.3)
    places = [point["size"] * shift for point in known]
    axes.plot(places, [100 * point["score"] for point in known], marker, color=colour, markersize=5)
    fit = curve["fit"]
    if fit["reason"] is not None:  # no curve: a thin line from point to point
        axes.plot(places, [100 * point["score"] for point in known], linestyle=style, color=colour, linewidth=0.9)
        return
    line = fit["line"]
    axes.plot(line["sizes"], [100 * y for y in line["scores"]], linestyle=style, color=colour, linewidth=1.5)
    low, high = ([100 * y for y in line[end]] for end in ("low", "high"))
    axes.fill_between(line["sizes"], low, high, color=colour, alpha=0.1, linewidth=0)


def _set_axes(axes: Axes, title: str, sizes: Sequence[int], *, is_first: bool) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(map(float, sizes))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(list(sizes), [number(size) for size in sizes], parse_math=False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.set_title(short_name(title), color=INK, fontsize=FONT_POINTS, parse_math=False)
    axes.set_xlabel("images in the pool", color=INK, fontsize=FONT_POINTS)
    axes.spines["bottom"].set_color(FAINT)
    if is_first:
        axes.set_ylabel("score, %", color=INK, fontsize=FONT_POINTS)
    else:
        axes.tick_params(labelleft=False)


def _look(number_of_variant: int, dash: Any) -> tuple[str, str, Any]:
    """Return colour, marker and dash of a line."""
    i = number_of_variant % len(SERIES)
    return SERIES[i], MARKERS[i % len(MARKERS)], dash


def _handle(variant: str, model: str, number_of_variant: int, dash: Any) -> Line2D:
    colour, marker, style = _look(number_of_variant, dash)
    name = f"{short_name(variant)}, {model}"
    return Line2D([], [], color=colour, marker=marker, markersize=5, linestyle=style, linewidth=1.5, label=name)


def _described(curve: Mapping[str, Any]) -> str:
    points = ", ".join(f"{percent(point['score'])} at {number(point['size'])}" for point in curve["points"])
    return f"{visible(curve['variant'])} {curve['model']} {label(curve['mode'])}: {points}"
