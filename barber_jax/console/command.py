"""Parse the command line into dataclasses of options, with parsing errors as one line."""

import contextlib
import dataclasses
import functools
import io
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import tyro

from barber_jax.console.errors import BarberError
from barber_jax.console.values import check_values

Options = TypeVar("Options")


def parse(options: type[Options], program: str, arguments: list[str] | None = None) -> Options:
    """Parse the command line into an instance of the dataclass `options`.

    Args:
        program: module name to show in `--help`, such as `barber_jax.prune`.
        arguments: default sys.argv.

    Raises:
        BarberError: an option is unknown, missing, of the wrong type, or has a value that no option can take. tyro
            prints a box of text in these cases, but scripts rely on one line.
        SystemExit: after --help.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed = tyro.cli(tyro.conf.DisallowNone[options], prog=f"python -m {program}", args=arguments)
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _error_message(stderr.getvalue()) or "invalid options"
        raise BarberError(f"{message}; see python -m {program} --help") from None
    check_values(vars(parsed))
    return parsed


def parse_groups(
    command: type,
    groups: Mapping[str, type],
    program: str,
    arguments: list[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Parse the command line into several groups of options, which `--help` lists under separate headings.

    Args:
        command: class whose docstring's first paragraph describes the command in `--help`.
        groups: heading -> dataclass of options.
        program, arguments: as for `parse`.
        defaults: option -> default, overriding the group's.

    Returns:
        option -> value, for the options of all groups.

    Raises:
        BarberError, SystemExit: as `parse`.
    """
    combined = _combine(command, tuple(groups.items()), tuple(sorted((defaults or {}).items())))
    parsed = parse(tyro.conf.OmitArgPrefixes[combined], program, arguments)
    values = {name: value for heading in groups for name, value in vars(getattr(parsed, heading)).items()}
    check_values(values)
    return values


@functools.cache
def _combine(command: type, groups: tuple[tuple[str, type], ...], defaults: tuple[tuple[str, Any], ...]) -> type:
    """Make a dataclass with a field for each group. Cached because tyro takes long to examine a new class."""
    overrides, fields = dict(defaults), []
    for heading, group in groups:
        changed = {field.name for field in dataclasses.fields(group)} & overrides.keys()
        default = group(**{name: overrides[name] for name in changed}) if changed else dataclasses.MISSING
        fields.append((heading, group, dataclasses.field(default=default)))
    combined = dataclasses.make_dataclass(command.__name__, fields, frozen=True, kw_only=True)
    combined.__doc__ = (command.__doc__ or "").partition("\n\n")[0]
    return combined


def _error_message(box: str) -> str:
    """Extract a one-line message from the box of text that tyro prints: its first paragraph and suggested options."""
    title, *lines = re.sub(r"\x1b\[[0-9;]*m", "", box).strip().splitlines() or [""]
    # Strip the frame and the rules. In an encoding without box-drawing characters rules are hyphens, without a frame.
    lines = [re.sub(r"^-{3,}$", "", line.strip("│╭╮╰╯─ ")) for line in lines]
    first, _, rest = "\n".join(lines).strip().partition("\n\n")
    names = re.compile(r"^--[\w-]+", re.MULTILINE)
    if first.startswith("Missing from"):
        return "missing " + ", ".join(names.findall(first))
    suggested = ", ".join(names.findall(rest)) if rest.startswith("Perhaps you meant") else ""
    return (
        " ".join(first.removeprefix("Error parsing ").split()).rstrip(".")
        + (f" (perhaps you meant {suggested})" if suggested else "")
        or title
    )
