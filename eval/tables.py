"""The tables of a study: its runs, runs that differ in their seed alone, agreement of masks; and tables as Markdown."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from barber_jax.eval.agreement import Overlap
from barber_jax.eval.runs import REBUILD, Run

Table = tuple[list[str], list[list[str]]]
"""Head, and rows."""
Pairs = list[tuple[Run, Run, Overlap, Overlap | None]]
"""Two runs, the agreement of what they prune, and that of their swaps where both starts are known."""


@dataclass(frozen=True)
class Figure:
    """Something that is measured of a run.

    Attributes:
        title: the column's.
        value: of a run; None where it was not measured.
        form: how it is written.
        scale: what it is multiplied by first.
    """

    title: str
    value: Callable[[Run], float | None]
    form: str
    scale: float = 1

    def written(self, value: float | None) -> str:
        """A value as tables have it."""
        return "" if value is None else format(value * self.scale if self.scale != 1 else value, self.form)

    def over(self, runs: list[Run]) -> str:
        """Mean and sample standard deviation over the runs where it was measured."""
        values = [value for value in map(self.value, runs) if value is not None]
        if len(values) < 2:
            return "".join(map(self.written, values))
        return f"{self.written(mean(values))} ± {self.written(stdev(values))}"


def figures(runs: list[Run]) -> list[Figure]:
    """What was measured of any of the runs, in the order of columns."""

    def recorded(part: str, key: str) -> Callable[[Run], float | None]:
        return lambda run: (run.record or {}).get(part, {}).get(key)

    sources = dict.fromkeys(source for run in runs for source in run.perplexity)
    tasks = dict.fromkeys(task for run in runs for task in run.zero_shot)
    found = [Figure("sparsity", recorded("totals", "sparsity"), ".4f")]
    found += [Figure(f"perplexity, {Path(s).name}", lambda run, s=s: run.perplexity.get(s), ".2f") for s in sources]
    found += [Figure(_task(task, runs), lambda run, task=task: run.zero_shot.get(task), ".2f", 100) for task in tasks]
    found += [Figure("swaps", recorded("totals", "swaps"), ",.0f")]
    found += [Figure(f"loss {when}", recorded("totals", f"loss_{when}"), ".4g") for when in ("before", "after")]
    found += [Figure("seconds", lambda run: run.seconds, ".1f")]
    found += [
        Figure(f"GiB {where}", recorded("peak_memory", f"{where}_bytes"), ".2f", 2**-30) for where in ("host", "device")
    ]
    return [figure for figure in found if any(figure.value(run) is not None for run in runs)]


def columns(runs: list[Run]) -> Table:
    """A row for each run. Options are shown where runs differ."""
    varied, shown = _varied(runs), figures(runs)
    head = ["run", *map(_option, varied), *(figure.title for figure in shown)]
    rows = [[run.name, *_given(run, varied), *(figure.written(figure.value(run)) for figure in shown)] for run in runs]
    devices = [(run.record or {}).get("device") for run in runs]
    if any(devices):
        head.append("device")
        for row, device in zip(rows, devices, strict=True):
            row.append(f"{device['count']} x {device['kind']}" if device else "")
    return head, rows


def over_seeds(runs: list[Run]) -> Table | None:
    """A row for each setting that was run with several seeds, with means and sample standard deviations; None: there is
    no such setting."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.record:
            groups.setdefault(str(sorted({**run.settings, "seed": None}.items())), []).append(run)
    several = [group for group in groups.values() if len({run.settings["seed"] for run in group}) > 1]
    if not several:
        return None
    varied = [key for key in _varied([run for group in several for run in group]) if key != "seed"]
    shown = figures([run for group in several for run in group])
    rows = [
        [str(len(group)), *_given(group[0], varied), *(figure.over(group) for figure in shown)] for group in several
    ]
    return ["runs", *map(_option, varied), *(figure.title for figure in shown)], rows


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table as GitHub and others read it."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join("---" if place == 0 else "--:" for place in range(len(head))) + "|"
    return "\n".join([line(head), rule, *map(line, rows)]) + "\n"


def agreement_table(pairs: Pairs) -> Table:
    """Jaccard indices of every pair, over all weights and in the matrix that agrees least."""
    head = ["runs", "pruned sets", "lowest matrix", "swaps", "lowest matrix"]
    rows = []
    for one, other, pruned, swapped in pairs:
        row = [f"{one.name} / {other.name}", f"{pruned.whole:.4f}", f"{min(pruned.matrices.values()):.4f}"]
        rows.append(row + ([f"{swapped.whole:.4f}", f"{min(swapped.matrices.values()):.4f}"] if swapped else ["", ""]))
    return head, rows


def _varied(runs: list[Run]) -> list[str]:
    """Options in which runs differ."""
    pruned = [run.settings for run in runs if run.record]

    def differs(key: str) -> bool:
        # What a run without a rebuild has no use for is no difference.
        return len({str(own.get(key)) for own in pruned if own["rebuild"] or key not in REBUILD}) > 1

    return [key for key in dict.fromkeys(key for own in pruned for key in own) if differs(key)]


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _given(run: Run, options: list[str]) -> list[str]:
    return ["" if run.settings.get(key) is None else str(run.settings[key]) for key in options]


def _task(task: str, runs: list[Run]) -> str:
    limits = {run.limit for run in runs if run.zero_shot}
    shown = "zero-shot mean" if task == "mean" else task
    return shown + (f" (first {limits.pop()})" if len(limits) == 1 and limits != {None} else "")
