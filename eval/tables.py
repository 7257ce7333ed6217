"""Build the tables of a study: one row per run, statistics over seeds, agreement of masks; format them as Markdown."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from barber_jax.console.options import flag
from barber_jax.eval.agreement import Overlap
from barber_jax.eval.runs import REBUILD_OPTIONS, RECOVERY, Run, text_titles
from barber_jax.reports.markup import markdown_text
from barber_jax.reports.recover_page import held_out_losses

Table = tuple[list[str], list[list[str]]]
"""Header cells, and rows of cells."""
Pairs = list[tuple[Run, Run, Overlap, Overlap | None]]
"""Pairs of runs, each with the overlap of pruned weights and that of swapped weights (None where unknown)."""


SEEDS = ("seed", f"{RECOVERY}seed")
"""Settings that only choose the random numbers."""


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

    def held_out(index: int) -> Callable[[Run], float | None]:
        return lambda run: (held_out_losses(run.recovered) or (None, None))[index] if run.recovered else None

    def memory(key: str) -> Callable[[Run], float | None]:
        return lambda run: (run.latest or {}).get("peak_memory", {}).get(key)

    tasks = dict.fromkeys(task for run in runs for task in run.zero_shot)
    columns = [Column("sparsity", lambda run: run.sparsity, ".4f")]
    columns += [
        Column(f"perplexity, {Path(title).name}", lambda run, windows=windows: run.perplexity.get(windows), ".2f")
        for windows, title in text_titles(runs).items()
    ]
    columns += [
        Column(_task_title(task, runs), lambda run, task=task: run.zero_shot.get(task), ".2f", 100) for task in tasks
    ]
    columns += [Column("swaps", recorded("totals", "swaps"), ",.0f")]
    columns += [Column(f"loss {when}", recorded("totals", f"loss_{when}"), ".4g") for when in ("before", "after")]
    columns += [Column(f"held-out loss {when}", held_out(i), ".4f") for i, when in enumerate(("before", "recovered"))]
    columns += [Column("tokens/s", lambda run: (run.recovered or {}).get("tokens_per_second"), ",.0f")]
    columns += [Column("seconds", lambda run: run.seconds, ".1f")]
    columns += [Column(f"GiB {where}", memory(f"{where}_bytes"), ".2f", 2**-30) for where in ("host", "device")]
    return [column for column in columns if any(column.value(run) is not None for run in runs)]


def runs_table(runs: list[Run]) -> Table:
    """One row per run: its name, tokens it was recovered on, options in which runs differ, measured values, device."""
    varied, columns = _varied_options(runs), measured_columns(runs)
    recovered = [_recovered(run) for run in runs] if any(run.recovered for run in runs) else None
    head = ["run", *(["recovered"] if recovered else []), *map(_title, varied), *(column.title for column in columns)]
    rows = [
        [run.name, *_option_values(run, varied), *(column.cell(column.value(run)) for column in columns)]
        for run in runs
    ]
    for row, cell in zip(rows, recovered or [], strict=False):
        row.insert(1, cell)
    devices = [(run.latest or {}).get("device") for run in runs]
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
        if run.settings:
            groups.setdefault(str(sorted({**run.settings, **dict.fromkeys(SEEDS)}.items())), []).append(run)
    several = [group for group in groups.values() if len({_seeds(run) for run in group}) > 1]
    if not several:
        return None
    varied = [key for key in _varied_options([run for group in several for run in group]) if key not in SEEDS]
    columns = measured_columns([run for group in several for run in group])
    rows = [
        [str(len(group)), *_option_values(group[0], varied), *(column.mean_and_deviation(group) for column in columns)]
        for group in several
    ]
    return ["runs", *map(_title, varied), *(column.title for column in columns)], rows


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
    """Options in which the pruned runs differ, and those in which the recovered ones do."""
    pruned = [run.settings for run in runs if run.record]
    recovered = [run.settings for run in runs if run.recovered]

    def differs(key: str) -> bool:
        # Options of the rebuild have no effect on a run without one.
        those = recovered if key.startswith(RECOVERY) else pruned
        return len({str(each.get(key)) for each in those if key not in REBUILD_OPTIONS or each["rebuild"]}) > 1

    return [key for key in dict.fromkeys(key for each in [*pruned, *recovered] for key in each) if differs(key)]


def _title(option: str) -> str:
    """Header of an option's column: `--rate`, or `recover --rate` for that of a recovery."""
    name = option.removeprefix(RECOVERY)
    return flag(name) if name == option else f"recover {flag(name)}"


def _recovered(run: Run) -> str:
    """Tokens that a run was recovered on, "" for none."""
    return "" if run.tokens_recovering is None else f"{run.tokens_recovering:,} tokens"


def _seeds(run: Run) -> tuple:
    return tuple(run.settings.get(seed) for seed in SEEDS)


def _option_values(run: Run, options: list[str]) -> list[str]:
    return ["" if run.settings.get(key) is None else str(run.settings[key]) for key in options]


def _task_title(task: str, runs: list[Run]) -> str:
    """Header of a zero-shot column, with the number of documents where it was the same limit for all runs."""
    limits = {run.limit for run in runs if run.zero_shot}
    title = "zero-shot mean" if task == "mean" else task
    return title + (f" (first {limits.pop()})" if len(limits) == 1 and limits != {None} else "")
