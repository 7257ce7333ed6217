"""The structure that a parsed document must have: small checks, put together, that name the first wrong place."""

import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, str], None]
"""Takes a value and the path of its place, and raises `WrongStructure`."""

MAX_NUMBER = 1e100
"""Largest number in size: sums and plots of such numbers do not overflow."""


class WrongStructure(ValueError):
    """A value is missing or of another kind; the message names its place."""


def _wrong(place: str, wanted: str) -> WrongStructure:
    return WrongStructure(f"{place or 'its content'} is missing or not {wanted}")


def text(value: Any, place: str) -> None:
    """A text."""
    if not isinstance(value, str):
        raise _wrong(place, "text")


def flag(value: Any, place: str) -> None:
    """true or false."""
    if not isinstance(value, bool):
        raise _wrong(place, "true or false")


def scalar(value: Any, place: str) -> None:
    """A text, a number of moderate size, true, false or null."""
    if value is not None and not isinstance(value, str | bool):
        number()(value, place)


def number(least: float = -MAX_NUMBER, most: float = MAX_NUMBER, finite: bool = True) -> Check:
    """A number between two bounds; without `finite` also NaN and infinity."""

    def check(value: Any, place: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(place, "a number")
        if not finite and isinstance(value, float) and not math.isfinite(value):
            return
        # An integer beyond 64 bits fits no array.
        if not least <= value <= most or (isinstance(value, int) and abs(value) >= 2**63):
            raise _wrong(place, f"a number between {least:g} and {most:g}")

    return check


def integer(least: int = 0) -> Check:
    """An integer of 64 bits, at least `least`."""

    def check(value: Any, place: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise _wrong(place, f"an integer of at least {least}")

    return check


def optional(each: Check) -> Check:
    """null, or what `each` checks."""

    def check(value: Any, place: str) -> None:
        if value is not None:
            each(value, place)

    return check


def items(each: Check, least: int = 0) -> Check:
    """A list of at least so many entries."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            raise _wrong(place, f"a list of {least} or more entries")
        for index, entry in enumerate(value):
            each(entry, f"{place}[{index}]")

    return check


def mapping(each: Check, least: int = 0) -> Check:
    """An object with any names, at least so many."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict) or len(value) < least:
            raise _wrong(place, f"an object of {least} or more entries")
        for name, entry in value.items():
            each(entry, _below(place, name))

    return check


def fields(required: Mapping[str, Check], optionally: Mapping[str, Check] | None = None) -> Check:
    """An object with these names, and perhaps others that are not checked; those of `optionally` may be missing."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(place, "an object")
        for name, each in {**required, **(optionally or {})}.items():
            if name in value or name in required:
                each(value.get(name, _MISSING), _below(place, name))

    return check


def _below(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


_MISSING = object()
"""Stands for a missing value, which no check accepts."""
