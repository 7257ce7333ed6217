"""Groups of options: the base class that fills in defaults and rejects invalid values.

A group is a frozen dataclass defined beside the code that it configures, such as `RebuildOptions` beside the rebuild.
A command's configuration inherits from its groups; `settle` of each is called once all values are set.
"""

from typing import Any

from barber_jax.console.errors import BarberError


def flag(option: str) -> str:
    """Command-line form of an option's name: `reconstruct_rate` -> `--reconstruct-rate`."""
    return f"--{option.replace('_', '-')}"


class OptionGroup:
    """A group of options. Subclasses are frozen dataclasses with `kw_only=True`."""

    def settle(self) -> None:
        """Fill in defaults that depend on other options; raise `BarberError` for an invalid value."""

    def _settle_bases(self, group: type["OptionGroup"]) -> None:
        """Settle the groups that `group` puts together, in the order in which their options are shown."""
        for base in reversed(group.__bases__):
            base.settle(self)

    def _set(self, option: str, value: Any) -> None:
        """Set an option although the dataclass is frozen. To be called from `settle` only."""
        object.__setattr__(self, option, value)

    def _require_least(self, least: int, *options: str) -> None:
        """Raise `BarberError` if an option is given (not None) and below `least`."""
        for option in options:
            value = getattr(self, option)
            if value is not None and value < least:
                raise BarberError(f"{flag(option)} {value} must be at least {least}")

    def _require_most(self, most: int, *options: str) -> None:
        """Raise `BarberError` if an option is above `most`."""
        for option in options:
            value = getattr(self, option)
            if value > most:
                raise BarberError(f"{flag(option)} {value} is above {most}")
