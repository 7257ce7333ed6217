"""study.html: the tables and plots of a study."""

from collections.abc import Iterator

import numpy as np

from barber_jax.eval.agreement import Overlap
from barber_jax.eval.runs import Run
from barber_jax.eval.tables import Pairs, Table
from barber_jax.reports.figures import MAP, SERIES, Plots, heat, stacked
from barber_jax.reports.page import table


def page_parts(
    runs: list[Run],
    whole: Table,
    seeds: Table | None,
    pairs: Pairs,
    agreed: Table,
    reason: str | None,
) -> Iterator[str]:
    """The page's parts; `reason` says why masks are not compared."""
    yield f"<h1>Study of {len(runs)} runs</h1>"
    yield table(*whole)
    if seeds:
        yield "<h2>Over seeds</h2><p class='soft'>Mean ± standard deviation of runs that differ in --seed alone.</p>"
        yield table(*seeds)
    yield "<h2>Measured</h2><div class='plots'>" + "".join(_measured(runs)) + "</div>"
    yield "<h2>Agreement of masks</h2>"
    if not pairs:
        yield f"<p>{reason}</p>"
        return
    yield "<p class='soft'>Jaccard index: of two sets, what both have over what either has; 1 is the same set.</p>"
    yield "<div class='plots'>" + "".join(_agreement(pairs)) + "</div>"
    yield table(*agreed)


def _dots(groups: dict[str, dict[str, float]], x: str):
    """Draws a dot for each name in each group of values."""

    def draw(axes) -> None:
        names = list(dict.fromkeys(name for values in groups.values() for name in values))
        for place, (group, values) in enumerate(groups.items()):
            heights = [names.index(name) for name in values]
            colour = SERIES[place % len(SERIES)]
            axes.plot(list(values.values()), heights, "o", color=colour, label=group, markersize=6, alpha=0.85)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(x)
        axes.grid(True, alpha=0.5)
        shown = [value for values in groups.values() for value in values.values() if np.isfinite(value)]
        if shown and min(shown) > 0 and max(shown) > 4 * min(shown):
            axes.set_xscale("log")
        if len(groups) > 1:
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))

    return draw


def _measured(runs: list[Run]) -> Iterator[str]:
    plots = Plots()
    size = (4.6, max(3.0, 1.4 + 0.22 * len(runs)))
    sources = list(dict.fromkeys(source for run in runs for source in run.perplexity))
    if sources:
        values = {s: {run.name: run.perplexity[s] for run in runs if s in run.perplexity} for s in sources}
        yield plots.draw(_dots(values, "perplexity"), "Perplexity", size)
    means = {run.name: 100 * run.zero_shot["mean"] for run in runs if "mean" in run.zero_shot}
    if means:
        yield plots.draw(_dots({"mean": means}, "% right"), "Zero-shot mean accuracy", size)
    pruned = [run for run in runs if run.record]
    stages = list(dict.fromkeys(s for run in pruned for s in run.record["totals"]["seconds_per_stage"]))
    spent = {s: [run.record["totals"]["seconds_per_stage"].get(s, 0.0) for run in pruned] for s in stages}
    spent["making of starting masks elsewhere"] = [r.record.get("started_from", {}).get("seconds", 0.0) for r in pruned]
    if pruned:
        yield plots.draw(stacked(spent, [run.name for run in pruned], "seconds"), "Time in each stage", size)
        memory = {
            where: {r.name: r.record["peak_memory"][key] / 2**30 for r in pruned if key in r.record["peak_memory"]}
            for key, where in (("host_bytes", "host"), ("device_bytes", "device"))
        }
        shown = {where: values for where, values in memory.items() if values}
        yield plots.draw(_dots(shown, "GiB"), "Peak memory", size)


def _agreement(pairs: Pairs) -> Iterator[str]:
    plots = Plots()
    names = list(dict.fromkeys(run.name for one, other, _, _ in pairs for run in (one, other)))
    for what, place in (("pruned sets", 2), ("swaps", 3)):
        if not any(pair[place] for pair in pairs):
            continue
        if len(names) == 2:
            yield plots.draw(_by_matrix(pairs[0][place]), f"Agreement of {what}, matrix by matrix")
            continue
        square = np.full((len(names), len(names)), np.nan)
        np.fill_diagonal(square, 1.0)
        for pair in pairs:
            if pair[place]:
                a, b = names.index(pair[0].name), names.index(pair[1].name)
                square[a, b] = square[b, a] = pair[place].whole
        size = (4.6, max(3.0, 1.0 + 0.22 * len(names)))
        yield plots.draw(_square(square, names), f"Agreement of {what}; columns in the order of the rows", size)


def _by_matrix(overlap: Overlap):
    """Draws the index of every matrix, kinds down, blocks across."""
    kinds: dict[str, list[float]] = {}
    for name, value in overlap.matrices.items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(value)
    return heat(np.array(list(kinds.values())), list(kinds), "block", "Jaccard index")


def _square(values: np.ndarray, names: list[str]):
    def draw(axes) -> None:
        image = axes.imshow(values, cmap=MAP, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(len(names)), [str(number + 1) for number in range(len(names))], fontsize=7)
        axes.spines[:].set_visible(False)
        axes.figure.colorbar(image, ax=axes).outline.set_visible(False)

    return draw
