"""The `recover` section of a grid: options of `barber_jax.recover`, with which every pruned run is recovered."""

from pathlib import Path
from typing import Any

from barber_jax.console.errors import BarberError
from barber_jax.console.options import flag
from barber_jax.console.values import typed
from barber_jax.recovery.recover_config import RecoverConfig
from barber_jax.reports.recover_record import read_recover_record
from barber_jax.reports.run_record import load_record

SUFFIX = ",recovered"
"""After the name of a pruned run's folder."""
COMPARED = ("teacher", "text", "length", "batch", "rate", "warm_up", "mix", "clip", "scope", "rank", "seed")
COMPARED += ("held_out", "keep", "compute_dtype", "mesh")
"""Options that a finished recovery must have been given, as far as its recover.json has them as they were given."""


def recover_options(given: dict[str, Any], ckpt: str, pruned: Path) -> dict[str, Any]:
    """Options of barber_jax.recover for one pruned run, which writes beside it.

    Args:
        given: the section of the grid, values as the file has them.
        ckpt: the dense checkpoint: the teacher.

    Raises:
        BarberError: barber_jax.recover rejects them.
    """
    try:
        options = typed(given, RecoverConfig)
        options |= {"ckpt": str(pruned), "teacher": ckpt, "out": pruned.with_name(pruned.name + SUFFIX)}
        RecoverConfig(**options)
    except BarberError as error:
        raise BarberError(f"grid: recover: {error}") from None
    return options


def check_recovered(options: dict[str, Any]) -> None:
    """Raise `BarberError` if the recovery in `options["out"]` was made with other options, or of another pruned run."""
    config, folder = RecoverConfig(**options), options["out"]
    record = read_recover_record(folder)
    expected = {name: getattr(config, name) for name in COMPARED}
    if config.tokens or config.steps:
        expected["steps"] = config.steps or -(-config.tokens // (config.batch * config.length))
    for name, value in expected.items():
        found = record["options"].get(name)
        if found != value:
            raise BarberError(
                f"{folder} holds a recovery with {flag(name)} {found}, not {value}; choose another --out or remove "
                "the folder"
            )
    if record["source"]["run"] != load_record(Path(config.ckpt)):
        raise BarberError(f"{folder} holds a recovery of another run than {config.ckpt}; remove the folder")
