"""The configuration of a command: all its groups of options in one frozen dataclass."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup, flag


class Configuration(OptionGroup):
    """Base of the dataclasses (with `init=False`) that combine a command's groups of options.

    Attributes:
        GROUPS: heading in `--help` -> group of options.
    """

    GROUPS: ClassVar[Mapping[str, type[OptionGroup]]]

    def _fill(self, options: Mapping[str, Any]) -> None:
        """Set every option, those not given to their defaults, and settle.

        Raises:
            BarberError: an option is missing or unknown, or has an invalid value.
        """
        fields = dataclasses.fields(self)
        known = {field.name for field in fields}
        for name in options:
            if name not in known:
                raise BarberError(f"{flag(name)} is not an option of {type(self).__name__}")
        for field in fields:
            value = options.get(field.name, field.default)
            if value is dataclasses.MISSING:
                raise BarberError(f"missing {flag(field.name)}")
            self._set(field.name, value)
        self.settle()

    def _changed_words(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any], left_out: Collection[str]
    ) -> list[str]:
        """Command-line words of the options whose values differ from given defaults.

        Args:
            values: option -> value.
            defaults: option -> value, in addition to the dataclass's own defaults.
            left_out: options that are not written.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)} | dict(defaults)
        line: list[str] = []
        for option, value in values.items():
            if option in left_out or value == defaults[option]:
                continue
            if isinstance(value, bool):
                line.append(flag(option) if value else flag(f"no_{option}"))
            else:
                line += [flag(option), str(value)]
        return line
