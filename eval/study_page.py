"""Render the tables and plots of a study as the parts of study.html."""

from collections.abc import Iterator

import numpy as np

from barber_jax.console.structure import MAX_NUMBER
from barber_jax.eval.agreement import Overlap
from barber_jax.eval.runs import Run, text_titles
from barber_jax.eval.tables import Pairs, Table
from barber_jax.reports.figures import MAP, SERIES, Plots, heat, stacked
from barber_jax.reports.markup import Html, element
from barber_jax.reports.page import plots, soft, table


def page_parts(
    runs: list[Run],
    runs_table: Table,
    seeds_table: Table | None,
    pairs: Pairs,
    agreement_table: Table,
    reason: str | None,
) -> Iterator[Html]:
    """HTML of the page's body, part by part.

    Args:
        runs_table, seeds_table, agreement_table: as made by the functions of these names in tables.py.
        pairs: runs whose masks were compared; if there are none, `reason` says why.
    """
    yield element("h1", f"Study of {len(runs)} runs")
    yield table(*runs_table)
    if seeds_table:
        yield element("h2", "Over seeds")
        yield soft("Mean ± standard deviation of runs that differ in --seed alone.")
        yield table(*seeds_table)
    yield element("h2", "Measurements")
    yield plots(_measurement_plots(runs))
    yield element("h2", "Agreement of masks")
    if not pairs:
        yield element("p", reason)
        return
    yield soft("Jaccard index of two sets: size of the intersection over size of the union; 1 = equal.")
    yield plots(_agreement_plots(pairs))
    yield table(*agreement_table)


def _dot_plot(groups: dict[str, dict[str, float]], x_label: str):
    """Return a function that draws one row per run and one dot per value; `groups`: series -> run -> value."""

    def draw(axes) -> None:
        names = list(dict.fromkeys(name for values in groups.values() for name in values))
        for index, (group, values) in enumerate(groups.items()):
            heights = [names.index(name) for name in values]
            colour = SERIES[index % len(SERIES)]
            shown = [value if abs(value) < MAX_NUMBER else np.nan for value in values.values()]
            axes.plot(shown, heights, "o", color=colour, label=group, markersize=6, alpha=0.85)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(x_label)
        axes.grid(True, alpha=0.5)
        finite = [value for values in groups.values() for value in values.values() if abs(value) < MAX_NUMBER]
        if finite and min(finite) > 0 and max(finite) > 4 * min(finite):
            axes.set_xscale("log")
        if len(groups) > 1:
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))

    return draw


def _measurement_plots(runs: list[Run]) -> Iterator[Html]:
    """Plots of perplexity, zero-shot accuracy, time and memory, each where it was measured."""
    drawn = Plots()
    size = (4.6, max(3.0, 1.4 + 0.22 * len(runs)))
    if titles := text_titles(runs):
        values = {
            title: {run.name: run.perplexity[windows] for run in runs if windows in run.perplexity}
            for windows, title in titles.items()
        }
        yield drawn.draw(_dot_plot(values, "perplexity"), "Perplexity", size)
    means = {run.name: 100 * run.zero_shot["mean"] for run in runs if "mean" in run.zero_shot}
    if means:
        yield drawn.draw(_dot_plot({"mean": means}, "accuracy (%)"), "Zero-shot mean accuracy", size)
    pruned = [run for run in runs if run.latest]
    records = [run.record or {} for run in pruned]
    stages = list(dict.fromkeys(stage for each in records for stage in _stage_seconds(each)))
    seconds = {stage: [_stage_seconds(each).get(stage, 0.0) for each in records] for stage in stages}
    seconds["starting masks, made by another run"] = [
        each.get("started_from", {}).get("seconds", 0.0) for each in records
    ]
    if any(run.recovered for run in pruned):
        seconds["recovery"] = [run.seconds_recovering for run in pruned]
    if pruned:
        yield drawn.draw(stacked(seconds, [run.name for run in pruned], "seconds"), "Time in each stage", size)
        memory = {
            where: {r.name: r.latest["peak_memory"][key] / 2**30 for r in pruned if key in r.latest["peak_memory"]}
            for key, where in (("host_bytes", "host"), ("device_bytes", "device"))
        }
        measured = {where: values for where, values in memory.items() if values}
        yield drawn.draw(_dot_plot(measured, "GiB"), "Peak memory", size)


def _stage_seconds(record: dict) -> dict[str, float]:
    return record.get("totals", {}).get("seconds_per_stage", {})


def _agreement_plots(pairs: Pairs) -> Iterator[Html]:
    """Plots for pruned and for swapped weights: every matrix for two runs, every pair for more."""
    drawn = Plots()
    names = list(dict.fromkeys(run.name for one, other, _, _ in pairs for run in (one, other)))
    for what, field in (("pruned sets", 2), ("swaps", 3)):
        if not any(pair[field] for pair in pairs):
            continue
        if len(names) == 2:
            yield drawn.draw(_matrix_heat_map(pairs[0][field]), f"Agreement of {what}, by matrix")
            continue
        overall = np.full((len(names), len(names)), np.nan)
        np.fill_diagonal(overall, 1.0)
        for pair in pairs:
            if pair[field]:
                a, b = names.index(pair[0].name), names.index(pair[1].name)
                overall[a, b] = overall[b, a] = pair[field].overall
        size = (4.6, max(3.0, 1.0 + 0.22 * len(names)))
        yield drawn.draw(_run_heat_map(overall, names), f"Agreement of {what}; columns in the order of rows", size)


def _matrix_heat_map(overlap: Overlap):
    """Return a function that draws the Jaccard index of every matrix; rows are kinds of linears, columns are blocks."""
    kinds: dict[str, list[float]] = {}
    for name, value in overlap.per_matrix.items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(value)
    return heat(np.array(list(kinds.values())), list(kinds), "block", "Jaccard index")


def _run_heat_map(values: np.ndarray, names: list[str]):
    """Return a function that draws [runs, runs] Jaccard indices, rows labelled with names and columns with numbers."""

    def draw(axes) -> None:
        image = axes.imshow(values, cmap=MAP, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(len(names)), [str(number + 1) for number in range(len(names))], fontsize=7)
        axes.spines[:].set_visible(False)
        axes.figure.colorbar(image, ax=axes).outline.set_visible(False)

    return draw
