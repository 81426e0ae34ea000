"""Figures as inline SVG that takes its colours from the page, so that they follow light and dark."""

import html
import io
import re
import warnings
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from stic_ray.report.formats import visible

# Drawn in these colours and then renamed: matplotlib knows no CSS variables.
INK, FAINT = "#010203", "#040506"
SERIES = ("#070809", "#0a0b0c", "#0d0e0f", "#101112", "#131415", "#161718")
FONT_POINTS = 9
MARKERS = ("o", "D", "s", "^", "v", "P")

_VARIABLES = {
    INK: "var(--muted)",
    FAINT: "var(--line)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, 1)},
}
_WIDTH_INCHES = 4.4
_MAX_NAME_CHARACTERS = 24


def new_figure(height_inches: float, width_inches: float = _WIDTH_INCHES) -> Figure:
    """Return an empty figure."""
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


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
    """Return a name of the user's on one line, cut to what fits beside a plot."""
    text = " ".join(visible(word).split())
    return text if len(text) <= _MAX_NAME_CHARACTERS else f"{text[: _MAX_NAME_CHARACTERS - 1]}…"
