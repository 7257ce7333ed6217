"""Run a grid of settings described in YAML or TOML: prune with every setting and evaluate each result.

    prune: {samples: 128, length: 2048}          options of barber_jax.prune that all runs share
    sweep:                                       groups; each is expanded to all combinations of the listed values
      - {method: [magnitude, wanda], rebuild: false}
      - {method: wanda, granularity: [output1, layer], alpha: [0.01, 0.1]}
    perplexity: {dataset: [wikitext2], length: 2048}    options of barber_jax.eval.perplexity; optional
    zero_shot: {tasks: [boolq, rte]}             options of barber_jax.eval.zero_shot; optional
    recover: {text: c4, tokens: 2000000}         options of barber_jax.recover, for every run; optional
    dense: true                                  whether to evaluate the dense model too

Several files are merged: later files override `prune`, `perplexity`, `zero_shot`, `recover` and `dense`, and extend
`sweep`. With `recover`, every run is also recovered, with the dense model as the teacher, and evaluated again.

Runs that differ only in the stages after the starting mask share one run that makes the starting masks (stream A and
the criterion's statistics are computed once). Every run is a process of its own, so that its peak memory is not mixed
with that of others. A grid that was interrupted continues when the same command is run again.
"""

import itertools
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from barber_jax.config import PRESETS, PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.console.options import flag
from barber_jax.console.outputs import write_whole
from barber_jax.console.values import typed, words
from barber_jax.convert.export import MASKS, RECOVERED, RUN, sibling_path
from barber_jax.criteria import CRITERIA
from barber_jax.eval.grid_file import Options, read_grid
from barber_jax.eval.grid_recovery import check_recovered, recover_options
from barber_jax.eval.perplexity import PerplexityConfig
from barber_jax.eval.runs import OTHER_STAGE_OPTIONS, PERPLEXITY_FILE, REBUILD_OPTIONS, ZERO_SHOT_FILE
from barber_jax.eval.zero_shot import ZeroShotConfig
from barber_jax.reports.record_check import START_OPTIONS
from barber_jax.reports.run_record import load_record
from barber_jax.stages import unused_options

__all__ = ["Setting", "prune_arguments", "read_grid", "run_grid", "settings"]

STAGE_OPTIONS = ("rebuild", *REBUILD_OPTIONS, *OTHER_STAGE_OPTIONS)
"""Options that do not affect the starting masks."""
MAX_RUNS = 10_000
"""Most combinations of one group of a sweep."""


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


def settings(grid: dict[str, Any], ckpt: str) -> list[Setting]:
    """Expand a grid to its runs, those that make starting masks first.

    Raises:
        BarberError: an option has a value that barber_jax.prune rejects.
    """
    starts: dict[tuple, Setting] = {}
    stage_runs: dict[tuple, Setting] = {}
    for group in grid["sweep"]:
        lists = [value if isinstance(value, list) else [value] for value in group.values()]
        if math.prod(map(len, lists)) > MAX_RUNS:
            raise BarberError(f"grid: a group of the sweep makes more than {MAX_RUNS} runs; split it")
        for values in itertools.product(*lists):
            varied = dict(zip(group, values, strict=True))
            given = {**grid["prune"], **varied}
            _typed(given)
            options = _effective_options(given)
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


def _typed(options: Options, config: type = PruneConfig) -> dict[str, Any]:
    """The options' values in the types of a command's options; raises `BarberError` if one does not fit."""
    try:
        return typed(options, config)
    except BarberError as error:
        raise BarberError(f"grid: {error}") from None


def _config(ckpt: str, options: Options) -> PruneConfig:
    try:
        return PruneConfig(ckpt=ckpt, out=Path("x"), **_typed(options))
    except BarberError as error:
        raise BarberError(f"grid: {str(error).removeprefix('grid: ')}") from None


def prune_options(setting: Setting, ckpt: str, out: Path) -> dict[str, Any]:
    """Options of barber_jax.prune for one run, which writes to `out`/NAME."""
    given = {"ckpt": ckpt, "out": out / setting.name}
    if setting.start is None:
        return given | _typed(setting.options)
    options, config = _typed(setting.options), setting.config
    start_only = ("method", "sparsity", *START_OPTIONS)
    for option in (*start_only, *(["rebuild"] if config.rebuild else [])):
        options.pop(option, None)
    # With --masks, prune would take Wanda's published defaults, whichever method made the masks.
    options |= {"granularity": config.granularity, "alpha": config.alpha}
    options.pop("pattern", None)  # recorded in the mask file
    start_folder = out / setting.start.name
    given["masks"] = start_folder / MASKS
    if CRITERIA[config.method].updates_weights:
        # SparseGPT and ALPS also update the weights.
        given["sparse_ckpt"] = str(start_folder)
    return given | options


def prune_arguments(setting: Setting, ckpt: str, out: Path) -> list[str]:
    """Command-line arguments for `prune_options`."""
    return words(prune_options(setting, ckpt, out))


def _evaluation_options(config: type, options: Options, ckpt: str) -> dict[str, Any]:
    """Options of an evaluation in a grid; raises `BarberError` if they do not make the evaluation's `config`."""
    given = {"ckpt": ckpt, **_typed(options, config)}
    for field in fields(config):
        if field.default is MISSING and field.name not in given:
            raise BarberError(f"grid: missing {flag(field.name)}")
    try:
        config(**given)
    except BarberError as error:
        raise BarberError(f"grid: {error}") from None
    return given


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
    for _, options, _, config in evaluations:
        words(_evaluation_options(config, options, ckpt))
    for setting in runs:
        prune_arguments(setting, ckpt, out)
        if grid["recover"]:
            recover_options(grid["recover"], ckpt, out / setting.name)
    folders = []
    if grid["dense"] == "true" and evaluations:
        folders.append(out / "dense")
        folders[0].mkdir(parents=True, exist_ok=True)
        for evaluation in evaluations:
            _evaluate(evaluation, ckpt, folders[0], log)
    for number, setting in enumerate(runs, 1):
        folder = out / setting.name
        log(f"{number} of {len(runs)}: {setting.name}")
        options = prune_options(setting, ckpt, out)
        if (folder / RUN).is_file():
            _check_options(folder, PruneConfig(**options))
        else:
            _run_or_resume("prune", options, log)
        made = [folder]
        if grid["recover"]:
            options = recover_options(grid["recover"], ckpt, folder)
            if (options["out"] / RECOVERED).is_file():
                check_recovered(options)
            else:
                _run_or_resume("recover", options, log)
            made.append(options["out"])
        for folder, evaluation in itertools.product(made, evaluations):
            _evaluate(evaluation, str(folder), folder, log)
        folders += made
    return folders


def _run_or_resume(module: str, options: dict[str, Any], log: Callable[[str], None]) -> None:
    """Run a command that writes to `options["out"]`, or continue it where it was cut off."""
    unfinished = sibling_path(options["out"], ".run").exists()
    _run_module(module, [*words(options), *(["--resume"] if unfinished else [])], log)


def _evaluations(grid: dict[str, Any]) -> Iterator[tuple[str, Options, str, type]]:
    """(module, options, name of the result file, class of the options) of each evaluation in the grid."""
    for key, module, file, config in (
        ("perplexity", "eval.perplexity", PERPLEXITY_FILE, PerplexityConfig),
        ("zero_shot", "eval.zero_shot", ZERO_SHOT_FILE, ZeroShotConfig),
    ):
        if grid[key]:
            yield module, grid[key], file, config


def _evaluate(evaluation: tuple[str, Options, str, type], ckpt: str, folder: Path, log: Callable[[str], None]) -> None:
    """Evaluate a checkpoint as by `_evaluations` and write the result, unless `folder` holds that of these options."""
    module, options, name, config = evaluation
    file = folder / name
    options_file = file.with_suffix(".asked.json")
    key = json.dumps([module, options], sort_keys=True) + "\n"
    if not (file.is_file() and options_file.is_file() and options_file.read_text(encoding="utf-8") == key):
        _run_module(module, words(_evaluation_options(config, options, ckpt) | {"json": file}), log)
        write_whole(options_file, key)


def _check_options(folder: Path, config: PruneConfig) -> None:
    """Raise `BarberError` if the run in the folder was made with other options than these."""
    recorded = load_record(folder)["options"]
    names = (*STAGE_OPTIONS, "ckpt", "method", "calibration", "samples", "length", "seed", "compute_dtype", "mesh")
    expected = {name: getattr(config, name) for name in names}
    if config.method:
        # Under --masks these belong to the run that made the masks, which is checked by itself.
        expected |= {"sparsity": config.sparsity_pattern.sparsity, "pattern": str(config.sparsity_pattern)}
        expected |= {name: getattr(config, name) for name in START_OPTIONS}
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
