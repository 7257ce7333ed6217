"""Command-line parsing: options from a dataclass, a mistake as one line."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import tyro

from barber_jax.console.errors import BarberError

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
            return tyro.cli(tyro.conf.DisallowNone[options], prog=f"python -m {program}", args=arguments)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise BarberError(f"{_gist(said.getvalue()) or 'bad options'}; see python -m {program} --help") from None


def parse_groups(
    command: type,
    groups: Mapping[str, type],
    program: str,
    arguments: list[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Options from the command line, in several groups that `--help` shows under headings of their own.

    Args:
        command: its docstring's first paragraph describes the command.
        groups: heading -> dataclass of options.
        program, arguments: as for `parse`.
        defaults: option -> default, where it is not its group's.

    Returns:
        option -> value, of all groups.

    Raises:
        BarberError, SystemExit: as `parse`.
    """
    fields = []
    for heading, group in groups.items():
        own = {field.name for field in dataclasses.fields(group)} & (defaults or {}).keys()
        default = group(**{name: defaults[name] for name in own}) if own else dataclasses.MISSING
        fields.append((heading, group, dataclasses.field(default=default)))
    whole = dataclasses.make_dataclass(command.__name__, fields, frozen=True, kw_only=True)
    whole.__doc__ = (command.__doc__ or "").partition("\n\n")[0]
    parsed = parse(tyro.conf.OmitArgPrefixes[whole], program, arguments)
    return {name: value for heading in groups for name, value in vars(getattr(parsed, heading)).items()}


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
