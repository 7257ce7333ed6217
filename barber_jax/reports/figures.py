"""Plots for HTML pages: matplotlib's SVG, put into the page itself, in colours that follow the reader's light or dark.

Figures are drawn in marker colours that occur nowhere else; in the SVG these become CSS variables.
"""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, LINE, SERIES = "#010203", "#010205", ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
VARIABLES = {INK: "--ink", LINE: "--line"} | {colour: f"--s{place}" for place, colour in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",
    # Element ids are hashes; with this they are the same in every process.
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
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
}
SIZE = (4.6, 3.0)
"""Inches: legible where a phone shows one below the other."""
MAP = "viridis"


class Plots:
    """Makes the figures of one page; each gets element ids of its own."""

    def __init__(self):
        self._count = 0

    def draw(self, draw, title: str, size: tuple[float, float] = SIZE, rows: int = 1, columns: int = 1) -> str:
        """An HTML figure.

        Args:
            draw: called with the axes (an array of them where there are several) and draws.
            title: what a caption says below it.
        """
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=size, layout="constrained")
            figure.patch.set_alpha(0)
            axes = figure.subplots(rows, columns, squeeze=rows * columns == 1)
            for each in np.atleast_1d(axes).flat:
                each.patch.set_alpha(0)
            draw(axes)
            file = io.StringIO()
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
        self._count += 1
        wide = " class='wide'" if size[0] > SIZE[0] else ""
        return f"<figure{wide}>{self._inline(file.getvalue(), title)}<figcaption>{escape(title)}</figcaption></figure>"

    def _inline(self, svg: str, title: str) -> str:
        svg = svg[svg.index("<svg") :]
        # Ids are unique in a file only, and a page holds many figures. What is the same is defined more than once.
        seen: set[str] = set()

        def first(found: re.Match) -> str:
            return "" if found[1] in seen else seen.add(found[1]) or f' id="f{self._count}-{found[1]}"'

        svg = re.sub(r'\sid="([^"]*)"', first, svg)
        svg = re.sub(r'(href="|url\()#', rf"\g<1>#f{self._count}-", svg)
        svg = re.sub(r"<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>", "", svg, flags=re.DOTALL)
        # Blank space at line ends and beginnings is most of such a file.
        svg = re.sub(r"\n\s*", "\n", svg)
        for colour, variable in VARIABLES.items():
            svg = svg.replace(colour, f"var({variable})")
        return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def escape(text: object) -> str:
    """Text for HTML."""
    return str(text).translate({38: "&amp;", 60: "&lt;", 62: "&gt;", 34: "&quot;", 39: "&#39;"})


def lines(series: Mapping[str, Sequence[float]], x: str, y: str, log: bool = False):
    """Draws named lines over 0, 1, 2, ...; every second one dashed where names come in pairs `before` and `after`."""

    def draw(axes) -> None:
        for place, (name, values) in enumerate(series.items()):
            colour = SERIES[place // 2 % len(SERIES)]
            axes.plot(values, "o-" if place % 2 else "o--", color=colour, label=name, alpha=1 if place % 2 else 0.55)
        if log and all(value > 0 for values in series.values() for value in values):
            axes.set_yscale("log")
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, axis="y", alpha=0.5)
        axes.legend(fontsize=8)

    return draw


def bars(values: Mapping[str, float], x: str):
    """Draws horizontal bars, in the order given from the top."""

    def draw(axes) -> None:
        axes.barh(list(values), list(values.values()), color=SERIES[0])
        axes.invert_yaxis()
        axes.set_xlabel(x)
        axes.grid(True, axis="x", alpha=0.5)

    return draw


def stacked(parts: Mapping[str, Sequence[float]], names: Sequence[str], x: str):
    """Draws a horizontal bar for each name, made of parts."""

    def draw(axes) -> None:
        left = np.zeros(len(names))
        for place, (part, values) in enumerate(parts.items()):
            colour = SERIES[place % len(SERIES)]
            axes.barh(names, values, left=left, color=colour, label=part, alpha=1 if place < len(SERIES) else 0.5)
            left += np.asarray(values)
        axes.invert_yaxis()
        axes.set_xlabel(x)
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))

    return draw


def heat(values: np.ndarray, rows: Sequence[str], columns: str, label: str):
    """Draws a table of numbers [rows, columns] as colours, with the scale beside it."""

    def draw(axes) -> None:
        image = axes.imshow(values, aspect="auto", cmap=MAP, interpolation="nearest")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(columns)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[:].set_visible(False)
        bar = axes.figure.colorbar(image, ax=axes, label=label)
        bar.outline.set_visible(False)

    return draw
