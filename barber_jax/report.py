"""Command `python -m barber_jax.report`: regenerate report.html of a pruned checkpoint."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from barber_jax.console.command import parse
from barber_jax.console.errors import exit_with_one_line
from barber_jax.console.files import expand
from barber_jax.console.locks import output_lock
from barber_jax.reports.report_page import write_report


@dataclass(frozen=True)
class ReportConfig:
    """Regenerate report.html in the folder of a pruned checkpoint, from its run.json and masks.safetensors."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that barber_jax.prune wrote."""


def run(arguments: list[str] | None = None) -> None:
    """Run the command with command-line arguments (default sys.argv) and print the path of report.html."""
    config = parse(ReportConfig, "barber_jax.report", arguments)
    folder = expand(config.folder)
    with output_lock(folder) if folder.is_dir() else contextlib.nullcontext():
        report = write_report(folder)
    print(report)


if __name__ == "__main__":
    exit_with_one_line(run)
