"""Read grid files (see grid.py) in YAML or TOML, and merge them."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from barber_jax.config import PruneConfig
from barber_jax.console import documents
from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand
from barber_jax.devices.options import PROCESS_OPTIONS
from barber_jax.eval.perplexity import PerplexityConfig
from barber_jax.eval.zero_shot import ZeroShotConfig
from barber_jax.recovery.recover_config import RecoverConfig

KEYS = ("prune", "sweep", "perplexity", "zero_shot", "recover", "dense")
RESERVED_OPTIONS = (
    "ckpt",
    "out",
    "json",
    "masks",
    "teacher",
    "log_dir",
    "sparse_ckpt",
    "overwrite",
    "resume",
    "eval_text",
    "eval_dataset",
    "eval_windows",
    "compilation_cache",
    *PROCESS_OPTIONS,
)
"""Options that a grid file may not set: the grid sets them itself or evaluates in another way, or they concern the
machine and not the experiment."""
CONFIGS = {"prune": PruneConfig, "perplexity": PerplexityConfig, "zero_shot": ZeroShotConfig, "recover": RecoverConfig}
"""Keys that hold options, and the class of these."""
Options = dict[str, Any]
"""Option name with `_` for `-` -> a value or a list of values, as the file has them: text, from YAML."""


def read_grid(paths: list[Path]) -> dict[str, Any]:
    """Read grid files and merge them, later ones over earlier ones.

    Returns:
        a value for every key of `KEYS`.

    Raises:
        BarberError: a file cannot be read, or holds an unknown key or option, or a value of the wrong type.
    """
    grid: dict[str, Any] = {"sweep": [], "dense": "true", **{key: {} for key in CONFIGS}}
    for path in paths:
        content = _parse_file(path)
        for key, value in content.items():
            if key not in KEYS:
                raise BarberError(f"{path}: unknown key {key!r}; known: {', '.join(KEYS)}")
            if key == "sweep":
                if not (isinstance(value, list) and all(isinstance(group, dict) for group in value)):
                    raise BarberError(f"{path}: sweep must be a list of groups of options")
                grid["sweep"] = grid["sweep"] + value
            elif key == "dense":
                if str(value).lower() not in ("true", "false"):
                    raise BarberError(f"{path}: dense must be true or false, not {value!r}")
                grid["dense"] = str(value).lower()
            elif isinstance(value, dict):
                grid[key] = {**grid[key], **value}
            else:
                raise BarberError(f"{path}: {key} must hold options, not {value!r}")
        for key, options in CONFIGS.items():
            _check_names(path, key, content.get(key, {}), options)
        for group in content.get("sweep", []):
            _check_names(path, "sweep", group, PruneConfig)
            if [] in group.values():
                raise BarberError(f"{path}: sweep: an option with an empty list makes no run; leave it out")
    if not grid["sweep"]:
        raise BarberError(f"{paths[0]}: no sweep; list groups of options to prune with")
    return grid


def _parse_file(path: Path) -> dict:
    kind = "toml" if path.suffix == ".toml" else "yaml"
    try:
        content = documents.read(expand(path), kind)
    except FileNotFoundError:
        raise BarberError(f"{path}: no such file; give a grid in YAML or TOML") from None
    except (OSError, ValueError) as error:
        raise BarberError(f"{path}: not {kind.upper()} ({error}); write it again") from error
    if not isinstance(content, dict):
        raise BarberError(f"{path}: must hold the keys {', '.join(KEYS)}")
    return content


def _check_names(path: Path, key: str, options: dict, config: type) -> None:
    """Raise `BarberError` if `options`, listed under `key`, has a name that is no option of `config`."""
    known = {field.name for field in fields(config)} - set(RESERVED_OPTIONS)
    for name in options:
        if name not in known:
            raise BarberError(f"{path}: {key}: unknown option {name!r}; known: {', '.join(sorted(known))}")
