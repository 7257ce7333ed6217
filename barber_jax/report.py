"""Command `python -m barber_jax.report`: regenerate report.html of a pruned or recovered checkpoint."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from barber_jax.console.command import parse
from barber_jax.console.errors import exit_with_one_line
from barber_jax.console.files import expand
from barber_jax.console.locks import output_lock
from barber_jax.convert.export import RECOVERED
from barber_jax.reports.recover_page import write_recover_report
from barber_jax.reports.report_page import write_report


@dataclass(frozen=True)
class ReportConfig:
    """Regenerate report.html of a pruned checkpoint, from its run.json and masks.safetensors, or of a recovered
    checkpoint, from its recover.json."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that barber_jax.prune or barber_jax.recover wrote."""


def run(arguments: list[str] | None = None) -> None:
    """Run the command with command-line arguments (default sys.argv) and print the path of report.html."""
    config = parse(ReportConfig, "barber_jax.report", arguments)
    folder = expand(config.folder)
    with output_lock(folder) if folder.is_dir() else contextlib.nullcontext():
        report = write_recover_report(folder) if (folder / RECOVERED).is_file() else write_report(folder)
    print(report)


if __name__ == "__main__":
    exit_with_one_line(run)
