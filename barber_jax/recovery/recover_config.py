"""Options of `python -m barber_jax.recover`, checked against each other."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from barber_jax.console.command import parse_groups
from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup, flag
from barber_jax.console.values import check_values
from barber_jax.devices.options import PROCESS_OPTIONS
from barber_jax.recovery.options import (
    ModelOptions,
    RecoverDeviceOptions,
    RecoverEvaluationOptions,
    RecoverFileOptions,
    TextOptions,
    TrainingOptions,
)

NOT_REPRODUCED = ("out", "overwrite", "resume", "verbose", "log_dir", "compilation_cache", *PROCESS_OPTIONS)
"""Options that concern one machine or one attempt; left out of the command line that reproduces a result."""


@dataclass(frozen=True, kw_only=True, init=False)
class RecoverConfig(
    ModelOptions, TextOptions, TrainingOptions, RecoverDeviceOptions, RecoverEvaluationOptions, RecoverFileOptions
):
    """Train the surviving weights of a pruned checkpoint, its zeros held.

    Args:
        options: by name, as on the command line with `_` for `-`.

    Raises:
        BarberError: an option is missing or unknown, or has an invalid value.
    """

    GROUPS: ClassVar[Mapping[str, type[OptionGroup]]] = {
        "model": ModelOptions,
        "text": TextOptions,
        "training": TrainingOptions,
        "devices": RecoverDeviceOptions,
        "evaluation": RecoverEvaluationOptions,
        "files": RecoverFileOptions,
    }
    """Heading in `--help` -> group of options."""

    def __init__(self, **options: Any):
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

    @classmethod
    def parse(cls, program: str, arguments: list[str] | None = None) -> "RecoverConfig":
        """Parse the command line of `python -m program`; `arguments` default to sys.argv.

        Raises:
            BarberError: an option is missing or unknown, or has an invalid value.
            SystemExit: after --help.
        """
        return cls(**parse_groups(cls, cls.GROUPS, program, arguments))

    def settle(self) -> None:
        """Settle every group, then options that depend on several groups."""
        check_values(self.as_dict())
        for group in self.GROUPS.values():
            group.settle(self)
        if self.mix and not self.teacher:
            raise BarberError(f"--mix {self.mix:g} needs --teacher; without it the loss is cross-entropy alone")
        if self.text == "c4" and not (self.tokens or self.steps):
            raise BarberError("--text c4 has 156 billion tokens; give --tokens or --steps")

    def as_dict(self) -> dict[str, Any]:
        """All options by name."""
        return dataclasses.asdict(self)

    def command_line(self) -> list[str]:
        """Options that give this configuration again on the command line, without --out and those of one machine."""
        line = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in NOT_REPRODUCED or value == field.default:
                continue
            if field.name == "rank" and value == 16:
                continue
            if isinstance(value, bool):
                line.append(flag(field.name) if value else flag(f"no_{field.name}"))
            else:
                line += [flag(field.name), str(value)]
        return line
