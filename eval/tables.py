"""Build the tables of a study: one row per run, statistics over seeds, agreement of masks; format them as Markdown."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from barber_jax.console.options import flag
from barber_jax.eval.agreement import Overlap
from barber_jax.eval.runs import REBUILD_OPTIONS, Run
from barber_jax.reports.markup import markdown_text

Table = tuple[list[str], list[list[str]]]
"""Header cells, and rows of cells."""
Pairs = list[tuple[Run, Run, Overlap, Overlap | None]]
"""Pairs of runs, each with the overlap of pruned weights and that of swapped weights (None where unknown)."""


@dataclass(frozen=True)
class Column:
    """A column of measured values.

    Attributes:
        title: header of the column.
        value: returns the value of a run, or None where it was not measured.
        spec: format specification of a value.
        scale: factor applied to a value before formatting.
    """

    title: str
    value: Callable[[Run], float | None]
    spec: str
    scale: float = 1

    def cell(self, value: float | None) -> str:
        """Text of a cell; empty for None."""
        return "" if value is None else format(value * self.scale if self.scale != 1 else value, self.spec)

    def mean_and_deviation(self, runs: list[Run]) -> str:
        """Mean ± sample standard deviation over the runs that have a value; a single value is shown by itself."""
        values = [value for value in map(self.value, runs) if value is not None]
        if len(values) < 2:
            return "".join(map(self.cell, values))
        return f"{self.cell(mean(values))} ± {self.cell(stdev(values))}"


def measured_columns(runs: list[Run]) -> list[Column]:
    """Columns of everything that was measured for at least one of the runs."""

    def recorded(part: str, key: str) -> Callable[[Run], float | None]:
        return lambda run: (run.record or {}).get(part, {}).get(key)

    sources = dict.fromkeys(source for run in runs for source in run.perplexity)
    tasks = dict.fromkeys(task for run in runs for task in run.zero_shot)
    columns = [Column("sparsity", recorded("totals", "sparsity"), ".4f")]
    columns += [Column(f"perplexity, {Path(s).name}", lambda run, s=s: run.perplexity.get(s), ".2f") for s in sources]
    columns += [
        Column(_task_title(task, runs), lambda run, task=task: run.zero_shot.get(task), ".2f", 100) for task in tasks
    ]
    columns += [Column("swaps", recorded("totals", "swaps"), ",.0f")]
    columns += [Column(f"loss {when}", recorded("totals", f"loss_{when}"), ".4g") for when in ("before", "after")]
    columns += [Column("seconds", lambda run: run.seconds, ".1f")]
    columns += [
        Column(f"GiB {where}", recorded("peak_memory", f"{where}_bytes"), ".2f", 2**-30) for where in ("host", "device")
    ]
    return [column for column in columns if any(column.value(run) is not None for run in runs)]


def runs_table(runs: list[Run]) -> Table:
    """One row per run: its name, the options in which runs differ, measured values, and the device."""
    varied, columns = _varied_options(runs), measured_columns(runs)
    head = ["run", *map(flag, varied), *(column.title for column in columns)]
    rows = [
        [run.name, *_option_values(run, varied), *(column.cell(column.value(run)) for column in columns)]
        for run in runs
    ]
    devices = [(run.record or {}).get("device") for run in runs]
    if any(devices):
        head.append("device")
        for row, device in zip(rows, devices, strict=True):
            row.append(f"{device['count']} x {device['kind']}" if device else "")
    return head, rows


def seeds_table(runs: list[Run]) -> Table | None:
    """One row per setting that was run with several seeds: number of runs, mean ± sample standard deviation.

    None where no two runs differ in their seed alone.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.record:
            groups.setdefault(str(sorted({**run.settings, "seed": None}.items())), []).append(run)
    several = [group for group in groups.values() if len({run.settings["seed"] for run in group}) > 1]
    if not several:
        return None
    varied = [key for key in _varied_options([run for group in several for run in group]) if key != "seed"]
    columns = measured_columns([run for group in several for run in group])
    rows = [
        [str(len(group)), *_option_values(group[0], varied), *(column.mean_and_deviation(group) for column in columns)]
        for group in several
    ]
    return ["runs", *map(flag, varied), *(column.title for column in columns)], rows


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in GitHub's Markdown; all columns but the first are right-aligned."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(map(markdown_text, cells)) + " |"

    delimiter = "|" + "|".join("---" if index == 0 else "--:" for index in range(len(head))) + "|"
    return "\n".join([line(head), delimiter, *map(line, rows)]) + "\n"


def agreement_table(pairs: Pairs) -> Table:
    """One row per pair of runs: Jaccard indices of pruned and swapped weights, overall and in the lowest matrix."""
    head = ["runs", "pruned sets", "lowest matrix", "swaps", "lowest matrix"]
    rows = []
    for one, other, pruned, swapped in pairs:
        row = [f"{one.name} / {other.name}"]
        for overlap in (pruned, swapped):
            row += [f"{overlap.overall:.4f}", f"{min(overlap.per_matrix.values()):.4f}"] if overlap else ["", ""]
        rows.append(row)
    return head, rows


def _varied_options(runs: list[Run]) -> list[str]:
    """Options in which the pruned runs differ."""
    settings = [run.settings for run in runs if run.record]

    def differs(key: str) -> bool:
        # Options of the rebuild have no effect on a run without one.
        return len({str(each.get(key)) for each in settings if each["rebuild"] or key not in REBUILD_OPTIONS}) > 1

    return [key for key in dict.fromkeys(key for each in settings for key in each) if differs(key)]


def _option_values(run: Run, options: list[str]) -> list[str]:
    return ["" if run.settings.get(key) is None else str(run.settings[key]) for key in options]


def _task_title(task: str, runs: list[Run]) -> str:
    """Header of a zero-shot column, with the number of documents where it was the same limit for all runs."""
    limits = {run.limit for run in runs if run.zero_shot}
    title = "zero-shot mean" if task == "mean" else task
    return title + (f" (first {limits.pop()})" if len(limits) == 1 and limits != {None} else "")
