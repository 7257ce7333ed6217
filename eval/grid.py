"""Run a grid of settings described in YAML or TOML: prune with every setting and evaluate each result.

    prune: {samples: 128, length: 2048}          options of barber_jax.prune that all runs share
    sweep:                                       groups; each is expanded to all combinations of the listed values
      - {method: [magnitude, wanda], rebuild: false}
      - {method: wanda, granularity: [output1, layer], alpha: [0.01, 0.1]}
    perplexity: {dataset: [wikitext2], length: 2048}    options of barber_jax.eval.perplexity; optional
    zero_shot: {tasks: [boolq, rte]}             options of barber_jax.eval.zero_shot; optional
    dense: true                                  whether to evaluate the dense model too

Several files are merged: later files override `prune`, `perplexity`, `zero_shot` and `dense`, and extend `sweep`.

Runs that differ only in the stages after the starting mask share one run that makes the starting masks (stream A and
the criterion's statistics are computed once). Every run is a process of its own, so that its peak memory is not mixed
with that of others. A grid that was interrupted continues when the same command is run again.
"""

import itertools
import json
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from barber_jax.config import PRESETS, PruneConfig
from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError
from barber_jax.console.files import writing
from barber_jax.console.options import flag
from barber_jax.convert.export import MASKS, RUN, sibling_path
from barber_jax.criteria import CRITERIA
from barber_jax.eval.perplexity import PerplexityConfig
from barber_jax.eval.runs import OTHER_STAGE_OPTIONS, PERPLEXITY_FILE, REBUILD_OPTIONS, ZERO_SHOT_FILE
from barber_jax.eval.zero_shot import ZeroShotConfig
from barber_jax.reports.run_record import load_record
from barber_jax.stages import unused_options

KEYS = ("prune", "sweep", "perplexity", "zero_shot", "dense")
RESERVED_OPTIONS = (
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
"""Options that a grid file may not set: the grid sets them itself, or evaluates in another way."""
STAGE_OPTIONS = ("rebuild", *REBUILD_OPTIONS, *OTHER_STAGE_OPTIONS)
"""Options that do not affect the starting masks."""
Options = dict[str, Any]
"""Option name with `_` for `-` -> a value or a list of values, as text."""


@dataclass(frozen=True)
class Setting:
    """One run of a grid.

    Attributes:
        name: of the run's folder.
        options: of barber_jax.prune, without `RESERVED_OPTIONS`.
        config: the options, parsed.
        start: the run that makes its starting masks; None if the run makes them itself.
    """

    name: str
    options: Options
    config: PruneConfig
    start: "Setting | None" = None


def read_grid(paths: list[Path]) -> dict[str, Any]:
    """Read grid files and merge them, later ones over earlier ones.

    Returns:
        a value for every key of `KEYS`.

    Raises:
        BarberError: a file cannot be read, or holds an unknown key or option, or a value of the wrong type.
    """
    grid: dict[str, Any] = {"prune": {}, "sweep": [], "perplexity": {}, "zero_shot": {}, "dense": "true"}
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
        for key, options in (("prune", PruneConfig), ("perplexity", PerplexityConfig), ("zero_shot", ZeroShotConfig)):
            _check_names(path, key, content.get(key, {}), options)
        for group in content.get("sweep", []):
            _check_names(path, "sweep", group, PruneConfig)
            if [] in group.values():
                raise BarberError(f"{path}: sweep: an option with an empty list makes no run; leave it out")
    if not grid["sweep"]:
        raise BarberError(f"{paths[0]}: no sweep; list groups of options to prune with")
    return grid


def _parse_file(path: Path) -> dict:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        # BaseLoader keeps every scalar as text; YAML would read the pattern 2:4 as a base-60 number.
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
    """Raise `BarberError` if `options`, listed under `key`, has a name that is no option of `config`."""
    known = {field.name for field in fields(config)} - set(RESERVED_OPTIONS)
    for name in options:
        if name not in known:
            raise BarberError(f"{path}: {key}: unknown option {name!r}; known: {', '.join(sorted(known))}")


def option_arguments(options: Options) -> list[str]:
    """Command-line arguments for options: `--name value...`, or `--name` and `--no-name` for true and false."""
    out = []
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        lower = [str(each).lower() for each in values]
        if lower in (["true"], ["false"]):
            out.append(flag(name) if lower == ["true"] else flag(f"no_{name}"))
        else:
            out += [flag(name), *map(str, values)]
    return out


def settings(grid: dict[str, Any], ckpt: str) -> list[Setting]:
    """Expand a grid to its runs, those that make starting masks first.

    Raises:
        BarberError: an option has a value that barber_jax.prune rejects.
    """
    starts: dict[tuple, Setting] = {}
    stage_runs: dict[tuple, Setting] = {}
    for group in grid["sweep"]:
        lists = [value if isinstance(value, list) else [value] for value in group.values()]
        for values in itertools.product(*lists):
            varied = dict(zip(group, values, strict=True))
            options = _effective_options({**grid["prune"], **varied})
            config = _config(ckpt, options)
            start_options = {name: value for name, value in options.items() if name not in STAGE_OPTIONS}
            key = tuple(sorted((name, str(value)) for name, value in start_options.items()))
            if key not in starts:
                labels = {"method": config.method} | {n: v for n, v in varied.items() if n not in STAGE_OPTIONS}
                start_options = {**start_options, "rebuild": "false"}
                name = _folder_name({**labels, "rebuild": "no"})
                starts[key] = Setting(name, start_options, _config(ckpt, start_options))
            if config.runs_stages:
                labels = {"method": config.method} | {n: v for n, v in varied.items() if n != "rebuild"}
                if not config.rebuild or not any(name in STAGE_OPTIONS for name in labels):
                    labels["rebuild"] = "yes" if config.rebuild else "no"
                setting = Setting(_folder_name(labels), options, config, starts[key])
                stage_runs.setdefault((*key, *(getattr(config, name) for name in STAGE_OPTIONS)), setting)
    found = [*starts.values(), *stage_runs.values()]
    names = [setting.name for setting in found]
    unique: dict[int, Setting] = {}
    for index, each in enumerate(found):
        # Labels leave out what is set under `prune`, so names can coincide; the index makes them unique.
        name = each.name if names.count(each.name) == 1 else f"{each.name},{index}"
        unique[id(each)] = replace(each, name=name, start=each.start and unique[id(each.start)])
    return list(unique.values())


def _effective_options(options: Options) -> Options:
    """Replace `preset` by the options that it stands for, and drop options of stages that are off.

    A group may vary a stage's switch together with the stage's options, which barber_jax.prune rejects if it is off.
    """
    preset = options.get("preset", "paper")
    if preset not in PRESETS:
        raise BarberError(f"grid: preset {preset!r} is unknown; known are {', '.join(PRESETS)}")
    expanded = {**PRESETS[preset], **options}
    expanded.pop("preset", None)
    switches = {name: str(expanded.get(name, 0)).lower() not in ("0", "false") for name in ("refine", "reconstruct")}
    switches["rebuild"] = str(expanded.get("rebuild", True)).lower() != "false"
    # Options are still text here; the other switches are compared with nothing but their defaults.
    defaults = {field.name: field.default for field in fields(PruneConfig)}
    unused = unused_options(SimpleNamespace(**defaults | switches | {"alpha": expanded.get("alpha")}))
    return {name: value for name, value in expanded.items() if name not in unused}


def _folder_name(labels: dict[str, Any]) -> str:
    return ",".join(f"{name}={str(value).replace(':', '-').replace('/', '-')}" for name, value in labels.items())


def _config(ckpt: str, options: Options) -> PruneConfig:
    try:
        return PruneConfig.parse("barber_jax.prune", ["--ckpt", ckpt, "--out", "x", *option_arguments(options)])
    except BarberError as error:
        raise BarberError(f"grid: {error}") from None


def prune_arguments(setting: Setting, ckpt: str, out: Path) -> list[str]:
    """Command-line arguments of barber_jax.prune for one run, which writes to `out`/NAME."""
    arguments = ["--ckpt", ckpt, "--out", str(out / setting.name)]
    if setting.start is None:
        return [*arguments, *option_arguments(setting.options)]
    options, config = dict(setting.options), setting.config
    start_only = ("method", "sparsity", "allocate", "owl_lambda", "owl_m")
    for option in (*start_only, *(["rebuild"] if config.rebuild else [])):
        options.pop(option, None)
    # With --masks, prune would take Wanda's published defaults, whichever method made the masks.
    options |= {"granularity": config.granularity, "alpha": config.alpha}
    options.pop("pattern", None)  # recorded in the mask file
    start_folder = out / setting.start.name
    arguments += ["--masks", str(start_folder / MASKS)]
    if CRITERIA[config.method].updates_weights:
        # SparseGPT also updates the weights.
        arguments += ["--sparse-ckpt", str(start_folder)]
    return arguments + option_arguments(options)


def run_grid(grid: dict[str, Any], ckpt: str, out: Path, log: Callable[[str], None]) -> list[Path]:
    """Run and evaluate the settings of a grid that are not finished yet.

    Args:
        out: folder for the runs' folders.
        log: called with lines about the progress.

    Returns:
        the runs' folders; first the folder of the dense model's results, if the dense model is evaluated.

    Raises:
        BarberError: a run failed, or a folder holds a run with other options.
    """
    runs = settings(grid, ckpt)
    evaluations = list(_evaluations(grid))
    for module, options, _, config in evaluations:
        parse(config, f"barber_jax.{module}", ["--ckpt", ckpt, *option_arguments(options)])
    folders = []
    if grid["dense"] == "true" and evaluations:
        folders.append(out / "dense")
        folders[0].mkdir(parents=True, exist_ok=True)
        for module, options, file, _ in evaluations:
            _evaluate(module, ckpt, options, folders[0] / file, log)
    for number, setting in enumerate(runs, 1):
        folder = out / setting.name
        folders.append(folder)
        log(f"{number} of {len(runs)}: {setting.name}")
        arguments = prune_arguments(setting, ckpt, out)
        if (folder / RUN).is_file():
            _check_options(folder, arguments)
        else:
            unfinished = sibling_path(folder, ".run").exists()
            _run_module("prune", [*arguments, *(["--resume"] if unfinished else [])], log)
        for module, options, file, _ in evaluations:
            _evaluate(module, str(folder), options, folder / file, log)
    return folders


def _evaluations(grid: dict[str, Any]) -> Iterator[tuple[str, Options, str, type]]:
    """(module, options, name of the result file, class of the options) of each evaluation in the grid."""
    for key, module, file, config in (
        ("perplexity", "eval.perplexity", PERPLEXITY_FILE, PerplexityConfig),
        ("zero_shot", "eval.zero_shot", ZERO_SHOT_FILE, ZeroShotConfig),
    ):
        if grid[key]:
            yield module, grid[key], file, config


def _evaluate(module: str, ckpt: str, options: Options, file: Path, log: Callable[[str], None]) -> None:
    """Evaluate a checkpoint and write `file`, unless it already holds the result for these options."""
    options_file = file.with_suffix(".asked.json")
    key = json.dumps([module, options], sort_keys=True) + "\n"
    if not (file.is_file() and options_file.is_file() and options_file.read_text(encoding="utf-8") == key):
        _run_module(module, ["--ckpt", ckpt, "--json", str(file), *option_arguments(options)], log)
        with writing(options_file):
            options_file.write_text(key, encoding="utf-8")


def _check_options(folder: Path, arguments: list[str]) -> None:
    """Raise `BarberError` if the run in the folder was made with other options than these arguments."""
    recorded, config = load_record(folder)["options"], PruneConfig.parse("barber_jax.prune", arguments)
    names = (*STAGE_OPTIONS, "ckpt", "method", "calibration", "samples", "length", "seed", "compute_dtype", "mesh")
    expected = {name: getattr(config, name) for name in names}
    if config.method:
        # Under --masks these belong to the run that made the masks, which is checked by itself.
        expected |= {"sparsity": config.sparsity_pattern.sparsity, "pattern": str(config.sparsity_pattern)}
        expected |= {"owl_lambda": config.owl_lambda, "owl_m": config.owl_m}
    for name, value in expected.items():
        if recorded.get(name) != value:
            raise BarberError(
                f"{folder} holds a run with {flag(name)} {recorded.get(name)}, not {value}; "
                "choose another --out or remove the folder"
            )


def _run_module(module: str, arguments: list[str], log: Callable[[str], None]) -> None:
    """Run `python -m barber_jax.MODULE` in a process of its own; raise `BarberError` if it fails."""
    line = [sys.executable, "-m", f"barber_jax.{module}", *arguments]
    log(f"python -m barber_jax.{module} {shlex.join(arguments)}")
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    try:
        status = process.wait()
    except BaseException:
        # Not killed, as `subprocess.run` would: the run says how it can be resumed, and removes what is unfinished.
        process.terminate()
        process.wait()
        raise
    if status:
        raise BarberError(f"barber_jax.{module} failed, see above; run the same command again to continue")
