"""Options of `python -m barber_jax.recover`, checked against each other."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from barber_jax.console.command import parse_groups
from barber_jax.console.configuration import Configuration
from barber_jax.console.errors import BarberError
from barber_jax.console.options import OptionGroup
from barber_jax.console.values import check_values
from barber_jax.data.calibration import SELF
from barber_jax.devices.options import PROCESS_OPTIONS
from barber_jax.recovery.options import (
    DEFAULT_RANK,
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
    ModelOptions,
    TextOptions,
    TrainingOptions,
    RecoverDeviceOptions,
    RecoverEvaluationOptions,
    RecoverFileOptions,
    Configuration,
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
        self._fill(options)

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
        if self.text == SELF and not self.teacher:
            raise BarberError(f"--text {SELF} is text that the teacher writes; give --teacher")
        if self.text == SELF and not (self.tokens or self.steps):
            raise BarberError(f"--text {SELF} is as long as it is asked to be; give --tokens or --steps")
        if self.text == "c4" and not (self.tokens or self.steps):
            raise BarberError("--text c4 has 156 billion tokens; give --tokens or --steps")

    def as_dict(self) -> dict[str, Any]:
        """All options by name."""
        return dataclasses.asdict(self)

    def command_line(self) -> list[str]:
        """Options that give this configuration again on the command line, without --out and those of one machine."""
        filled = {"rank": DEFAULT_RANK} if self.scope == "lora" else {}
        return self._changed_words(self.as_dict(), filled, NOT_REPRODUCED)
