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
        raise BarberError(f"{_gist(said.getvalue()) or 'bad options'}; see python -m {program} --help") from None


def _gist(box: str) -> str:
    """What is wrong, from the box of text that tyro prints: its first paragraph, and the names it lists."""
    title, *lines = re.sub(r"\x1b\[[0-9;]*m", "", box).strip().splitlines() or [""]
    # Frame and rules go; where the output's encoding has no lines to draw, rules are hyphens and there is no frame.
    lines = [re.sub(r"^-{3,}$", "", line.strip("│╭╮╰╯─ ")) for line in lines]
    first, _, rest = "\n".join(lines).strip().partition("\n\n")
    names = re.compile(r"^--[\w-]+", re.MULTILINE)
    if first.startswith("Missing from"):
        return "missing " + ", ".join(names.findall(first))
    meant = ", ".join(names.findall(rest)) if rest.startswith("Perhaps you meant") else ""
    return " ".join(first.split()).rstrip(".") + (f" (perhaps you meant {meant})" if meant else "") or title


def set_precision() -> None:
    """Let a float32 product be one: GPUs and TPUs round its inputs to fewer bits by default."""
    jax.config.update("jax_default_matmul_precision", "highest")
