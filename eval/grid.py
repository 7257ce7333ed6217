"""Sweeps from a small YAML or TOML file: which settings to prune with, and what to measure of each.

    prune: {samples: 128, length: 2048}          options that all share, as of barber_jax.prune
    sweep:                                       groups; in each, every combination of the values listed
      - {method: [magnitude, wanda], rebuild: false}
      - {method: wanda, granularity: [output1, layer], alpha: [0.01, 0.1]}
    perplexity: {dataset: [wikitext2], length: 2048}    options of barber_jax.eval.perplexity
    zero_shot: {tasks: [boolq, rte]}             options of barber_jax.eval.zero_shot; may be left out
    dense: true                                  whether to measure the dense model too

Several files are put together: later ones overrule `prune`, `perplexity`, `zero_shot` and `dense`, and add to `sweep`.

What follows the starting masks begins with those of a run without it, which all settings with that start share: what
leads to them (stream A, the criterion's statistics) is computed once. Every run is a process of its own, so that its
peak memory is its own, and the whole is cut off and goes on at any place.
"""

import itertools
import json
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from barber_jax.config import PRESETS, PruneConfig
from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError
from barber_jax.console.files import writing
from barber_jax.convert.export import MASKS, RUN, beside
from barber_jax.eval.perplexity import PerplexityConfig
from barber_jax.eval.runs import PERPLEXITY, REBUILD, STAGES, ZERO_SHOT
from barber_jax.eval.zero_shot import ZeroShotConfig
from barber_jax.reports.run_record import load_record
from barber_jax.stages import unused_options

KEYS = ("prune", "sweep", "perplexity", "zero_shot", "dense")
OWN = (
    "ckpt",
    "out",
    "json",
    "masks",
    "sparse_ckpt",
    "overwrite",
    "resume",
    "eval_text",
    "eval_dataset",
    "eval_windows",
)
"""Options that a grid sets itself, or measures by other means."""
LATER = ("rebuild", *REBUILD, *STAGES)
"""Options that leave the starting masks as they are."""
Options = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One run of a grid.

    Attributes:
        name: its folder's.
        options: of barber_jax.prune, as text or lists of text, without those that the grid sets itself.
        config: what they mean.
        start: the run whose masks it starts from; None for a run that makes its own.
    """

    name: str
    options: Options
    config: PruneConfig
    start: "Setting | None" = None


def read_grid(paths: list[Path]) -> dict[str, Any]:
    """Grid files put together.

    Raises:
        BarberError: a file cannot be read, or holds an unknown key or something of the wrong shape.
    """
    whole: dict[str, Any] = {"prune": {}, "sweep": [], "perplexity": {}, "zero_shot": {}, "dense": "true"}
    for path in paths:
        content = _parse_file(path)
        for key, value in content.items():
            if key not in KEYS:
                raise BarberError(f"{path}: unknown key {key!r}; known: {', '.join(KEYS)}")
            if key == "sweep":
                if not (isinstance(value, list) and all(isinstance(group, dict) for group in value)):
                    raise BarberError(f"{path}: sweep must be a list of groups of options")
                whole["sweep"] = whole["sweep"] + value
            elif key == "dense":
                if str(value).lower() not in ("true", "false"):
                    raise BarberError(f"{path}: dense must be true or false, not {value!r}")
                whole["dense"] = str(value).lower()
            elif isinstance(value, dict):
                whole[key] = {**whole[key], **value}
            else:
                raise BarberError(f"{path}: {key} must hold options, not {value!r}")
        for key, options in (("prune", PruneConfig), ("perplexity", PerplexityConfig), ("zero_shot", ZeroShotConfig)):
            _check_names(path, key, content.get(key, {}), options)
        for group in content.get("sweep", []):
            _check_names(path, "sweep", group, PruneConfig)
            if [] in group.values():
                raise BarberError(f"{path}: sweep: an option with an empty list makes no run; leave it out")
    if not whole["sweep"]:
        raise BarberError(f"{paths[0]}: no sweep; list groups of options to prune with")
    return whole


def _parse_file(path: Path) -> dict:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        # Every YAML scalar stays text: the pattern 2:4 would be a number to base 60.
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, yaml.BaseLoader)
    except FileNotFoundError:
        raise BarberError(f"{path}: no such file; give a grid in YAML or TOML") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BarberError(f"{path}: not {'TOML' if path.suffix == '.toml' else 'YAML'} ({reason})") from error
    if not isinstance(content, dict):
        raise BarberError(f"{path}: must hold the keys {', '.join(KEYS)}")
    return content


def _check_names(path: Path, key: str, options: dict, config: type) -> None:
    known = {field.name for field in fields(config)} - set(OWN)
    for name in options:
        if name not in known:
            raise BarberError(f"{path}: {key}: unknown option {name!r}; known: {', '.join(sorted(known))}")


def arguments(options: Options) -> list[str]:
    """Options as a command line has them."""
    out = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        values = value if isinstance(value, list | tuple) else [value]
        lower = [str(each).lower() for each in values]
        if lower in (["true"], ["false"]):
            out.append(f"--{flag}" if lower == ["true"] else f"--no-{flag}")
        else:
            out += [f"--{flag}", *map(str, values)]
    return out


def settings(grid: dict[str, Any], ckpt: str) -> list[Setting]:
    """Every run that a grid asks for, those that give starting masks first.

    Raises:
        BarberError: an option has a value that barber_jax.prune refuses.
    """
    starts: dict[tuple, Setting] = {}
    rebuilt: dict[tuple, Setting] = {}
    for group in grid["sweep"]:
        lists = [value if isinstance(value, list) else [value] for value in group.values()]
        for values in itertools.product(*lists):
            varied = dict(zip(group, values, strict=True))
            options = _without_unused({**grid["prune"], **varied})
            config = _config(ckpt, options)
            kept = {name: value for name, value in options.items() if name not in LATER}
            key = tuple(sorted((name, str(value)) for name, value in kept.items()))
            if key not in starts:
                own = {"method": config.method} | {n: v for n, v in varied.items() if n not in LATER}
                first = {**kept, "rebuild": "false"}
                starts[key] = Setting(_name({**own, "rebuild": "no"}), first, _config(ckpt, first))
            if config.runs_stages:
                names = {"method": config.method} | {n: v for n, v in varied.items() if n != "rebuild"}
                if not config.rebuild or not any(name in LATER for name in names):
                    names["rebuild"] = "yes" if config.rebuild else "no"
                setting = Setting(_name(names), options, config, starts[key])
                rebuilt.setdefault((*key, *(getattr(config, name) for name in LATER)), setting)
    found = [*starts.values(), *rebuilt.values()]
    names = [setting.name for setting in found]
    # Two starts can differ in an option that all runs of their groups share, and so have the same name.
    return [
        each if names.count(each.name) == 1 else _renamed(each, f"{each.name},{place}")
        for place, each in enumerate(found)
    ]


def _without_unused(options: Options) -> Options:
    """The preset as the options that it means, and without options of stages that are off: a group may vary both."""
    preset = options.get("preset", "paper")
    if preset not in PRESETS:
        raise BarberError(f"grid: preset {preset!r} is unknown; known are {', '.join(PRESETS)}")
    whole = {**PRESETS[preset], **options}
    whole.pop("preset", None)
    switches = {name: str(whole.get(name, 0)).lower() not in ("0", "false") for name in ("refine", "reconstruct")}
    switches["rebuild"] = str(whole.get("rebuild", True)).lower() != "false"
    unused = unused_options(SimpleNamespace(**switches, alpha=whole.get("alpha"), target="dense"))
    return {name: value for name, value in whole.items() if name not in unused}


def _renamed(setting: Setting, name: str) -> Setting:
    return Setting(name, setting.options, setting.config, setting.start)


def _name(values: dict[str, Any]) -> str:
    return ",".join(f"{name}={str(value).replace(':', '-').replace('/', '-')}" for name, value in values.items())


def _config(ckpt: str, options: Options) -> PruneConfig:
    try:
        return PruneConfig.parse("barber_jax.prune", ["--ckpt", ckpt, "--out", "x", *arguments(options)])
    except BarberError as error:
        raise BarberError(f"grid: {error}") from None


def command(setting: Setting, ckpt: str, out: Path) -> list[str]:
    """The options of barber_jax.prune for one run under `out`."""
    line = ["--ckpt", ckpt, "--out", str(out / setting.name)]
    if setting.start is None:
        return [*line, *arguments(setting.options)]
    given, config = dict(setting.options), setting.config
    start_only = ("method", "sparsity", "allocate", "owl_lambda", "owl_m")
    for option in (*start_only, *(["rebuild"] if config.rebuild else [])):
        given.pop(option, None)
    given |= {"granularity": config.granularity, "alpha": config.alpha}
    given.pop("pattern", None)  # the mask file says it
    folder = out / setting.start.name
    line += ["--masks", str(folder / MASKS)]
    if config.method == "sparsegpt":
        # The criterion changed weights as well.
        line += ["--sparse-ckpt", str(folder)]
    return line + arguments(given)


def run_grid(grid: dict[str, Any], ckpt: str, out: Path, say: Callable[[str], None]) -> list[Path]:
    """Do what of a grid is not done yet.

    Returns:
        the runs' folders, the dense model's measurements first if they are asked for.

    Raises:
        BarberError: a run failed, or a folder holds another one.
    """
    todo = settings(grid, ckpt)
    measures = list(_measures(grid))
    for module, options, _, config in measures:
        parse(config, f"barber_jax.{module}", ["--ckpt", ckpt, *arguments(options)])
    folders = []
    if grid["dense"] == "true" and measures:
        folders.append(out / "dense")
        folders[0].mkdir(parents=True, exist_ok=True)
        for module, options, file, _ in measures:
            _measure(module, ckpt, options, folders[0] / file, say)
    for number, setting in enumerate(todo, 1):
        folder = out / setting.name
        folders.append(folder)
        say(f"{number} of {len(todo)}: {setting.name}")
        line = command(setting, ckpt, out)
        if (folder / RUN).is_file():
            _check_same(folder, line)
        else:
            unfinished = beside(folder, ".run").exists()
            _process("prune", [*line, *(["--resume"] if unfinished else [])], say)
        for module, options, file, _ in measures:
            _measure(module, str(folder), options, folder / file, say)
    return folders


def _measures(grid: dict[str, Any]) -> Iterator[tuple[str, Options, str, type]]:
    for key, module, file, config in (
        ("perplexity", "eval.perplexity", PERPLEXITY, PerplexityConfig),
        ("zero_shot", "eval.zero_shot", ZERO_SHOT, ZeroShotConfig),
    ):
        if grid[key]:
            yield module, grid[key], file, config


def _measure(module: str, ckpt: str, options: Options, file: Path, say: Callable[[str], None]) -> None:
    """Measure, unless the file holds what was measured with these options."""
    asked = file.with_suffix(".asked.json")
    key = json.dumps([module, options], sort_keys=True) + "\n"
    if not (file.is_file() and asked.is_file() and asked.read_text(encoding="utf-8") == key):
        _process(module, ["--ckpt", ckpt, "--json", str(file), *arguments(options)], say)
        with writing(asked):
            asked.write_text(key, encoding="utf-8")


def _check_same(folder: Path, line: list[str]) -> None:
    """Raise BarberError unless the folder holds the run of that command line."""
    found, wanted = load_record(folder)["options"], PruneConfig.parse("barber_jax.prune", line)
    names = (*LATER, "ckpt", "method", "calibration", "samples", "length", "seed", "compute_dtype", "mesh")
    asked = {name: getattr(wanted, name) for name in names}
    if wanted.method:
        # With --masks they are those of the run that made them, which is looked at itself.
        asked |= {"sparsity": wanted.sparsity_pattern.sparsity, "pattern": str(wanted.sparsity_pattern)}
        asked |= {"owl_lambda": wanted.owl_lambda, "owl_m": wanted.owl_m}
    for name, value in asked.items():
        if found.get(name) != value:
            option = f"--{name.replace('_', '-')}"
            raise BarberError(
                f"{folder} holds a run with {option} {found.get(name)}, not {value}; choose another --out or remove it"
            )


def _process(module: str, line: list[str], say: Callable[[str], None]) -> None:
    say(f"python -m barber_jax.{module} {shlex.join(line)}")
    if subprocess.run([sys.executable, "-m", f"barber_jax.{module}", *line], stdout=subprocess.DEVNULL).returncode:
        raise BarberError(f"barber_jax.{module} failed, see above; the same grid goes on from there")
