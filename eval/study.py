"""python -m barber_jax.eval.study: runs side by side (methods, devices, dtypes), as Markdown, JSON and HTML."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.files import writing
from barber_jax.eval.agreement import agreement, refusal
from barber_jax.eval.grid import read_grid, run_grid
from barber_jax.eval.runs import Run, load_runs
from barber_jax.eval.study_page import page_parts
from barber_jax.eval.tables import Pairs, agreement_table, columns, markdown, over_seeds

PAIRS = 30
"""More pairs of runs than these are for the page alone."""


@dataclass(frozen=True)
class StudyConfig:
    """Compare runs of barber_jax.prune, or run a grid of settings and compare those."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders that barber_jax.prune wrote; perplexity.json and zero_shot.json in them are read too."""
    out: Path = Path("study")
    """Folder to write study.md, study.json and study.html into; with --grid also the runs."""
    grid: tuple[Path, ...] = ()
    """Run the settings of these YAML or TOML files first, put together; what is done already is not done again."""
    ckpt: str | None = None
    """With --grid: the checkpoint to prune."""
    agreement: Literal["auto", "require", "skip"] = "auto"
    """Whether to compare masks: auto does where all runs are of one model, require refuses where they are not."""

    def __post_init__(self):
        if bool(self.grid) != bool(self.ckpt):
            raise BarberError("--grid and --ckpt go together: what to run, and on which checkpoint")
        if not self.grid and not self.folders:
            raise BarberError("nothing to compare; give folders of runs, or --grid FILE --ckpt CHECKPOINT")


def as_json(runs: list[Run], pairs: Pairs) -> dict:
    """The whole study for scripts."""
    described = [
        {
            "name": run.name,
            "folder": str(run.folder),
            "settings": run.settings,
            "perplexity": run.perplexity,
            "zero_shot": run.zero_shot,
            "zero_shot_limit": run.limit,
            "seconds": run.seconds,
            **{key: run.record[key] for key in ("totals", "peak_memory", "device", "versions") if run.record},
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
    return {"format": "barber_jax.study", "version": 1, "runs": described, "agreement": compared}


def study(runs: list[Run], out: Path, compare: str = "auto") -> str:
    """Write study.md, study.json and study.html; returns the first.

    Args:
        compare: whether to compare masks, see `StudyConfig.agreement`.

    Raises:
        BarberError: masks cannot be compared but must be, or nothing can be written.
    """
    from barber_jax.reports.page import page

    # `agreement` raises the reason where there is one.
    reason = {"auto": refusal(runs), "require": None, "skip": "masks were not compared, as asked"}[compare]
    pairs = [] if reason else agreement(runs)
    table, seeds = columns(runs), over_seeds(runs)
    text = markdown(*table)
    if seeds:
        text += "\nOver seeds, mean ± standard deviation:\n\n" + markdown(*seeds)
    if len(pairs) > PAIRS:
        text += f"\nAgreement of masks: {len(pairs)} pairs, in study.html and study.json\n"
    elif pairs:
        text += "\nAgreement of masks (Jaccard index):\n\n" + markdown(*agreement_table(pairs))
    else:
        text += f"\n{reason}\n"
    html = page("barber_jax study", page_parts(runs, table, seeds, pairs, agreement_table(pairs), reason))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "study.md").write_text(text, encoding="utf-8")
        (out / "study.json").write_text(json.dumps(as_json(runs, pairs), indent=1) + "\n", encoding="utf-8")
        (out / "study.html").write_text(html, encoding="utf-8")
    return text


def run(arguments: list[str] | None = None) -> None:
    """The command line: prints the tables, writes the files."""
    config = parse(StudyConfig, "barber_jax.eval.study", arguments)
    out = Path(os.path.expanduser(config.out))
    folders = list(config.folders)
    if config.grid:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        folders += run_grid(read_grid(list(config.grid)), config.ckpt, out, console.print)
    print(study(load_runs(folders), out, config.agreement))
    print(f"{out / 'study.html'}, study.md, study.json")


if __name__ == "__main__":
    exit_with_one_line(run)
