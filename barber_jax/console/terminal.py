"""Tables and lines on a terminal or in a file, printed letter by letter."""

import sys
from typing import TextIO

from rich.console import Console

FILE_WIDTH = 100
"""Columns of a table that is written into a file."""


def plain_console(stream: TextIO | None = None, width: int | None = None, quiet: bool = False) -> Console:
    """A console of rich that prints texts as they are.

    By itself rich reads names as its markup: it takes `[a]` out, raises an exception for `[/a]`, and makes a picture of
    `:dog:`. And where FORCE_COLOR is set, as in many build systems, it takes a log file for a terminal.

    Args:
        stream: to print to; None for standard output.
        width: columns where the stream is no terminal. Default: rich's own, 80 or COLUMNS.
        quiet: print nothing.
    """
    stream = stream or sys.stdout
    terminal = stream.isatty()
    return Console(
        file=stream,
        width=None if terminal else width,
        quiet=quiet,
        force_terminal=terminal,
        markup=False,
        emoji=False,
        highlight=False,
    )
