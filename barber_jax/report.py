"""python -m barber_jax.report: make report.html of a pruned checkpoint anew."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from barber_jax.console.command import parse
from barber_jax.console.errors import exit_with_one_line
from barber_jax.reports.report_page import write_report


@dataclass(frozen=True)
class ReportConfig:
    """Make report.html of a pruned checkpoint's folder anew, from its run.json and masks.safetensors."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that barber_jax.prune wrote."""


def run(arguments: list[str] | None = None) -> None:
    """The command line: writes report.html into the folder."""
    config = parse(ReportConfig, "barber_jax.report", arguments)
    print(write_report(config.folder.expanduser()))


if __name__ == "__main__":
    exit_with_one_line(run)
