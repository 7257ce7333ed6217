"""What every command line shares: options from a dataclass, errors on one line, exact float32 products."""

import contextlib
import io
import re
from typing import TypeVar

import jax
import tyro

from barber_jax.errors import BarberError

Options = TypeVar("Options")


def parse(options: type[Options], program: str, arguments: list[str] | None = None) -> Options:
    """Options from the command line (None: sys.argv).

    Raises:
        BarberError: an option is unknown, missing or of the wrong type. tyro prints a box for that; scripts rely on
            one line.
        SystemExit: after --help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(options, prog=f"python -m {program}", args=arguments)
    except SystemExit as stop:
        if not stop.code:
            raise
        words = " ".join(re.sub(r"[─│╭╮╰╯━]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())).split())
        words = re.sub(r"^(Parsing error|Unrecognized options|Required options)\s*:?\s*", "", words)
        words = words.partition(" For full helptext")[0]
        raise BarberError(f"{words or 'bad options'}; see python -m {program} --help") from None


def set_precision() -> None:
    """Let a float32 product be one: GPUs and TPUs round its inputs to fewer bits by default."""
    jax.config.update("jax_default_matmul_precision", "highest")
