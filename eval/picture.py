"""Draws the bar chart in the README from the figures in docs/results.json.

    python -m barber_jax.eval.picture docs/results.json docs/results.svg

The JSON holds

    format, version    "barber_jax.picture", 1
    source             the text with the tables that the figures are copied from, and its sections
    model, measure     what was measured; together they are the title
    settings           how it was measured, for a reader of the file
    note               a line below the title
    cut                optional: bars of a higher mean are cut off there, and say so
    methods            one colour each, in the order of the bars: name, options, and highlight for ours
    groups             name, options, and bars: method, mean and, where there are several runs, sd

The same file gives the same bytes with the same matplotlib.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon

from barber_jax.console import documents
from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.files import expand
from barber_jax.console.outputs import output_file, write_whole

WIDTH, HEIGHT = 720, 260
"""Pixels."""
# Every colour has a contrast of 3 or more with GitHub's white and with its #0d1117, text one of 4.
INK, HIGHLIGHT, SERIES = "#747d87", "#d4570f", ("#8a929b", "#4f86c6", "#2f9178", "#a371c9", "#a98600")
STYLE = {
    "svg.fonttype": "none",
    # Element ids are hashes; with this they are the same in every process.
    "svg.hashsalt": "barber_jax",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "axes.edgecolor": INK,
}
BAR, GAP = 0.86, 0.9
"""Width of a bar, where bars are 1 apart; space between groups."""
ROOM = 1.14
"""Height of the plot, in heights of the highest bar: labels stand above bars."""


@dataclass(frozen=True)
class PictureConfig:
    """Draw the results in a JSON file as a bar chart."""

    results: Annotated[Path, tyro.conf.Positional]
    """The figures, such as docs/results.json."""
    out: Annotated[Path, tyro.conf.Positional]
    """The SVG to write, such as docs/results.svg."""


@dataclass(frozen=True)
class Bar:
    """Mean and standard deviation (0: one run) of a method in a group."""

    method: str
    mean: float
    sd: float


@dataclass(frozen=True)
class Picture:
    """What is drawn.

    Attributes:
        title, note: lines above the bars.
        methods: name -> colour, in the order of the bars.
        groups: name -> bars.
        cut: where a bar is cut off.
    """

    title: str
    note: str
    methods: dict[str, str]
    groups: dict[str, list[Bar]]
    cut: float


def read_picture(path: Path) -> Picture:
    """What a JSON file asks for.

    Raises:
        BarberError: it cannot be read, or something is missing or wrong in it.
    """
    try:
        content = documents.read(path)
        if content["format"] != "barber_jax.picture" or content["version"] != 1:
            raise ValueError("format and version are not barber_jax.picture, 1")
        plain = iter(SERIES)
        methods = {
            each["name"]: HIGHLIGHT if each.get("highlight") else next(plain, SERIES[-1]) for each in content["methods"]
        }
        groups = {group["name"]: [_bar(bar, methods) for bar in group["bars"]] for group in content["groups"]}
        if not any(groups.values()):
            raise ValueError("there are no bars")
        cut = float(content.get("cut", math.inf))
        if not cut > 0:
            raise ValueError(f"cut is {cut:g}, not above 0")
        return Picture(f"{content['model']}: {content['measure']}", str(content["note"]), methods, groups, cut)
    except OSError as error:
        raise BarberError(f"{path}: {error.strerror}; give a file such as docs/results.json") from error
    except KeyError as error:
        raise BarberError(f"{path}: {error} is missing; compare it with docs/results.json") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise BarberError(f"{path}: {error}; compare it with docs/results.json") from error


def _bar(content: dict, methods: dict[str, str]) -> Bar:
    bar = Bar(content["method"], float(content["mean"]), float(content.get("sd", 0)))
    if bar.method not in methods:
        raise ValueError(f"bar of method {bar.method!r}, which methods does not list")
    if not (0 < bar.mean < math.inf and 0 <= bar.sd < math.inf):
        raise ValueError(f"{bar.method}: mean {bar.mean:g}, sd {bar.sd:g}")
    return bar


def draw(picture: Picture) -> str:
    """The picture as SVG, on a transparent background."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        figure.patch.set_alpha(0)
        axes = figure.add_axes((0.01, 0.09, 0.98, 0.70))
        axes.patch.set_alpha(0)
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.yaxis.set_visible(False)
        axes.tick_params(axis="x", length=0, labelsize=12)
        means = [bar.mean for bars in picture.groups.values() for bar in bars]
        top = min(picture.cut, max(means))
        axes.set_ylim(0, top * ROOM)
        left, middles = 0.0, []
        for bars in picture.groups.values():
            for place, bar in enumerate(bars):
                _draw_bar(axes, left + place, bar, picture, top)
            middles.append(left + (len(bars) - 1) / 2)
            left += len(bars) + GAP
        axes.set_xlim(-0.7, left - GAP - 0.3)
        axes.set_xticks(middles, picture.groups)
        figure.text(0.012, 0.935, picture.title, fontsize=13, weight="bold", va="center")
        figure.text(0.012, 0.855, picture.note, fontsize=10, va="center")
        handles = [Patch(color=colour) for colour in picture.methods.values()]
        figure.legend(
            handles,
            picture.methods,
            loc="center right",
            bbox_to_anchor=(0.995, 0.935),
            ncols=len(handles),
            frameon=False,
            handlelength=1,
            handleheight=1,
            handletextpad=0.5,
            columnspacing=1.4,
        )
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    # matplotlib writes points, which browsers take for 4/3 of a pixel.
    size = f'width="{WIDTH}" height="{HEIGHT}" role="img"'
    svg = svg.replace(f'width="{WIDTH}pt" height="{HEIGHT}pt"', size, 1)
    return "".join(line.rstrip() + "\n" for line in svg.splitlines())


def _draw_bar(axes: Axes, x: float, bar: Bar, picture: Picture, top: float) -> None:
    colour, label = picture.methods[bar.method], f"{bar.mean:.1f}"
    left, right = x - BAR / 2, x + BAR / 2
    highlighted = colour == HIGHLIGHT
    if bar.mean > top:
        # Two pieces with a slanted gap between them.
        low, high, gap = top * 0.80, top * 0.86, top * 0.03
        for corners in (
            [(left, 0), (left, low), (right, high), (right, 0)],
            [(left, low + gap), (left, top), (right, top), (right, high + gap)],
        ):
            axes.add_patch(Polygon(corners, color=colour, linewidth=0))
        end, label = top, f"{label} (cut)"
    else:
        axes.bar(x, bar.mean, BAR, color=colour, linewidth=0)
        end = bar.mean + bar.sd
        if bar.sd:
            axes.errorbar(x, bar.mean, bar.sd, color=INK, linewidth=1.2, capsize=3)
    axes.annotate(
        label,
        (x, end),
        (0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        weight="bold" if highlighted else "normal",
        color=colour if highlighted else INK,
    )


def run(arguments: list[str] | None = None) -> None:
    """The command line: writes the SVG and prints its path."""
    config = parse(PictureConfig, "barber_jax.eval.picture", arguments)
    with output_file(config.out, "--out") as out:
        write_whole(out, draw(read_picture(expand(config.results))))
    print(out)


if __name__ == "__main__":
    exit_with_one_line(run)
