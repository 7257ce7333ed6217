"""python -m barber_jax.eval.study: compare runs (methods, devices, dtypes) in Markdown, JSON and HTML."""

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.files import expand, writing
from barber_jax.console.locks import output_lock
from barber_jax.console.outputs import write_whole
from barber_jax.console.terminal import plain_console
from barber_jax.eval import device_page
from barber_jax.eval.agreement import agreement, incomparable_reason
from barber_jax.eval.grid import read_grid, run_grid
from barber_jax.eval.runs import Run, load_runs, text_titles
from barber_jax.eval.study_page import page_parts
from barber_jax.eval.tables import Pairs, agreement_table, markdown, runs_table, seeds_table
from barber_jax.reports.markup import markdown_text

MAX_PRINTED_PAIRS = 30
"""With more pairs of runs than this, study.md leaves the agreement table to study.html."""
RECOVERED_FIGURES = ("steps", "tokens", "evaluations", "best_step", "written", "seconds", "tokens_per_second")
"""Entries of recover.json that study.json repeats."""


@dataclass(frozen=True)
class StudyConfig:
    """Compare runs of barber_jax.prune or barber_jax.recover, or prune with a grid of settings and compare these."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders that barber_jax.prune or barber_jax.recover wrote; perplexity.json and zero_shot.json in them are read
    too. Or folders that barber_jax.eval.device_check wrote."""
    out: Path = Path("study")
    """Folder to write study.md, study.json and study.html to; with --grid also the runs."""
    grid: tuple[Path, ...] = ()
    """YAML or TOML files, merged into one grid; its unfinished runs are run before the comparison."""
    ckpt: str | None = None
    """With --grid: the checkpoint to prune."""
    agreement: Literal["auto", "require", "skip"] = "auto"
    """Compare masks: auto = if all runs prune the same model, require = fail if they do not, skip = never."""

    def __post_init__(self):
        if bool(self.grid) != bool(self.ckpt):
            raise BarberError("--grid and --ckpt go together; give both, or neither")
        if not self.grid and not self.folders:
            raise BarberError("nothing to compare; give folders of runs, or --grid FILE --ckpt CHECKPOINT")


def as_json(runs: list[Run], pairs: Pairs, checks: device_page.Checks) -> dict:
    """Content of study.json."""
    titles = text_titles(runs)
    described = [
        {
            "name": run.name,
            "folder": str(run.folder),
            "settings": run.settings,
            "perplexity": {titles[windows]: value for windows, value in run.perplexity.items()},
            "zero_shot": run.zero_shot,
            "zero_shot_limit": run.limit,
            "seconds": run.seconds,
            **({"totals": run.record["totals"]} if run.record else {}),
            **{key: run.latest[key] for key in ("peak_memory", "device", "versions") if run.latest},
            **({"recovered": {key: run.recovered[key] for key in RECOVERED_FIGURES}} if run.recovered else {}),
        }
        for run in runs
    ]
    compared = [
        {
            "runs": [one.name, other.name],
            "pruned": pruned.summary(),
            "swaps": swapped.summary() if swapped else None,
        }
        for one, other, pruned, swapped in pairs
    ]
    study = {"format": "barber_jax.study", "version": 1, "runs": described, "agreement": compared}
    return study | ({"device_checks": dict(checks)} if checks else {})


def study(runs: list[Run], out: Path, compare: str = "auto", checks: device_page.Checks | None = None) -> str:
    """Compare runs and device checks, and write study.md, study.json and study.html.

    Args:
        out: folder to write to.
        compare: whether to compare masks, see `StudyConfig.agreement`.
        checks: name and content of device checks.

    Returns:
        the content of study.md.

    Raises:
        BarberError: `compare` is "require" and the masks cannot be compared, a mask file is damaged, or `out` cannot
            be written.
    """
    from barber_jax.reports.page import page

    text, parts, pairs, checks = "", [], [], checks or []
    if runs:
        # With "require", `agreement` raises if the masks cannot be compared.
        reason = {
            "auto": incomparable_reason(runs),
            "require": None,
            "skip": "masks were not compared (--agreement skip)",
        }[compare]
        pairs = [] if reason else agreement(runs)
        table, seeds = runs_table(runs), seeds_table(runs)
        text = markdown(*table)
        if seeds:
            text += "\nOver seeds, mean ± standard deviation:\n\n" + markdown(*seeds)
        if len(pairs) > MAX_PRINTED_PAIRS:
            text += f"\nAgreement of masks: {len(pairs)} pairs, see study.html and study.json\n"
        elif pairs:
            text += "\nAgreement of masks (Jaccard index):\n\n" + markdown(*agreement_table(pairs))
        else:
            text += f"\n{markdown_text(reason, begins_line=True)}\n"
        parts += page_parts(runs, table, seeds, pairs, agreement_table(pairs), reason)
    if checks:
        text += device_page.markdown_page(checks)
        parts += device_page.page_parts(checks)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "study.md", text)
    write_whole(out / "study.json", json.dumps(as_json(runs, pairs, checks), indent=1) + "\n")
    write_whole(out / "study.html", page("barber_jax study", parts))
    return text


def run(arguments: list[str] | None = None) -> None:
    """Command line: run the grid if there is one, print the tables, write the files."""
    config = parse(StudyConfig, "barber_jax.eval.study", arguments)
    out = expand(config.out)
    folders = list(config.folders)
    with output_lock(out):
        if config.grid:
            say = functools.partial(plain_console(sys.stderr).print, soft_wrap=True)
            folders += run_grid(read_grid(list(config.grid)), config.ckpt, out, say)
        checked = [folder for folder in map(expand, folders) if (folder / device_page.CHECK_FILE).is_file()]
        checks = device_page.read_checks(checked)
        runs = load_runs([folder for folder in folders if expand(folder) not in checked])
        text = study(runs, out, config.agreement, checks)
    print(text)
    print(f"{out / 'study.html'}, study.md, study.json")


if __name__ == "__main__":
    exit_with_one_line(run)
