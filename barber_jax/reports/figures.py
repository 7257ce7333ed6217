"""Plots for HTML pages: matplotlib figures as inline SVG, whose colours follow the light or dark colour scheme.

Figures are drawn in placeholder colours that occur nowhere else; in the SVG these are replaced by CSS variables.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from barber_jax.reports.markup import NOT_SHOWN, Html, element, escape

INK, LINE, SERIES = "#010203", "#010205", ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
"""Placeholder colours of text, of axes and grid lines, and of data series."""
VARIABLES = {INK: "--ink", LINE: "--line"} | {colour: f"--s{index}" for index, colour in enumerate(SERIES)}
"""Placeholder colour -> CSS variable."""
STYLE = {
    "svg.fonttype": "none",
    # A fixed salt makes the hashes in element ids the same in every process.
    "svg.hashsalt": "barber_jax",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    # Names of folders and options may hold dollar signs, between which matplotlib would read mathematics.
    "text.parse_math": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
}
SIZE = (4.6, 3.0)
"""Default width and height in inches, legible on a phone, which shows one figure per row."""
MAP = "viridis"
"""Colour map of heat maps."""


class _PlainLog(LogFormatter):
    """Labels of a logarithmic axis as plain numbers: matplotlib's own are in its notation for mathematics."""

    def __call__(self, x, pos=None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


class Plots:
    """Draws the figures of one page, with element ids that are unique on the page."""

    def __init__(self):
        self._count = 0

    def draw(self, draw, title: str, size: tuple[float, float] = SIZE, rows: int = 1, columns: int = 1) -> Html:
        """Draw a figure and return it as an HTML <figure> element.

        Args:
            draw: function that draws on the axes it is given; with several rows or columns, on an array of axes.
            title: caption below the figure.
            size: width and height in inches.
            rows, columns: number of axes.
        """
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            # Such as of a letter that the layout's font does not have, but the reader's browser does.
            warnings.simplefilter("ignore")
            figure = Figure(figsize=size, layout="constrained")
            figure.patch.set_alpha(0)
            axes = figure.subplots(rows, columns, squeeze=rows * columns == 1)
            for each in np.atleast_1d(axes).flat:
                each.patch.set_alpha(0)
            draw(axes)
            for each in figure.axes:
                for axis in (each.xaxis, each.yaxis):
                    if axis.get_scale() == "log":
                        axis.set_major_formatter(_PlainLog())
                        axis.set_minor_formatter(_PlainLog())
            file = io.StringIO()
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
        self._count += 1
        wide = "wide" if size[0] > SIZE[0] else None
        return element("figure", self._inline(file.getvalue(), title), element("figcaption", title), class_=wide)

    def _inline(self, svg: str, title: str) -> Html:
        """Prepare an SVG file's text for inclusion in the page."""
        svg = NOT_SHOWN.sub("\ufffd", svg[svg.index("<svg") :])
        # Make ids unique on the page with a prefix per figure. matplotlib may define the same element more than once:
        # only the first keeps its id.
        seen: set[str] = set()

        def unique_id(found: re.Match) -> str:
            return "" if found[1] in seen else seen.add(found[1]) or f' id="f{self._count}-{found[1]}"'

        svg = re.sub(r'\sid="([^"]*)"', unique_id, svg)
        svg = re.sub(r'(href="|url\()#', rf"\g<1>#f{self._count}-", svg)
        svg = re.sub(r"<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>", "", svg, flags=re.DOTALL)
        # Indentation makes up most of the file.
        svg = re.sub(r"\n\s*", "\n", svg)
        for colour, variable in VARIABLES.items():
            svg = svg.replace(colour, f"var({variable})")
        return Html(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))


def lines(series: Mapping[str, Sequence[float]], x: str, y: str, log: bool = False):
    """Return a function that draws lines over 0, 1, 2, ...

    Args:
        series: name -> values, in pairs: a dashed line (before), then a solid line (after) in the same colour.
        x, y: axis labels.
        log: use a logarithmic y axis if all values are positive.
    """

    def draw(axes) -> None:
        for index, (name, values) in enumerate(series.items()):
            colour = SERIES[index // 2 % len(SERIES)]
            axes.plot(values, "o-" if index % 2 else "o--", color=colour, label=name, alpha=1 if index % 2 else 0.55)
        if log and all(value > 0 for values in series.values() for value in values):
            axes.set_yscale("log")
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, axis="y", alpha=0.5)
        axes.legend(fontsize=8)

    return draw


def bars(values: Mapping[str, float], x: str):
    """Return a function that draws horizontal bars (name -> value), the first at the top; `x` labels the x axis."""

    def draw(axes) -> None:
        axes.barh(list(values), list(values.values()), color=SERIES[0])
        axes.invert_yaxis()
        axes.set_xlabel(x)
        axes.grid(True, axis="x", alpha=0.5)

    return draw


def stacked(parts: Mapping[str, Sequence[float]], names: Sequence[str], x: str):
    """Return a function that draws stacked horizontal bars, one for each name.

    Args:
        parts: part -> its value in each bar.
        names: names of the bars, from the top.
        x: label of the x axis.
    """

    def draw(axes) -> None:
        left = np.zeros(len(names))
        for index, (part, values) in enumerate(parts.items()):
            colour = SERIES[index % len(SERIES)]
            axes.barh(names, values, left=left, color=colour, label=part, alpha=1 if index < len(SERIES) else 0.5)
            left += np.asarray(values)
        axes.invert_yaxis()
        axes.set_xlabel(x)
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))

    return draw


def heat(values: np.ndarray, rows: Sequence[str], columns: str, label: str):
    """Return a function that draws a heat map with a colour bar.

    Args:
        values: [rows, columns].
        rows: labels of the rows.
        columns: label of the x axis.
        label: of the colour bar.
    """

    def draw(axes) -> None:
        image = axes.imshow(values, aspect="auto", cmap=MAP, interpolation="nearest")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(columns)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[:].set_visible(False)
        bar = axes.figure.colorbar(image, ax=axes, label=label)
        bar.outline.set_visible(False)

    return draw
