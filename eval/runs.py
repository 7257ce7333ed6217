"""Read the folders that a study compares: run.json or recover.json, perplexity, zero-shot results."""

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from barber_jax.config import BeyondOptions
from barber_jax.console import documents
from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand
from barber_jax.console.structure import fields, integer, mapping, number, optional, text
from barber_jax.convert.export import MASKS, RECOVERED, RUN, START_MASKS
from barber_jax.devices.options import PROCESS_OPTIONS
from barber_jax.eval.perplexity import read_results
from barber_jax.reports.record_check import START_OPTIONS
from barber_jax.reports.recover_record import read_recover_record
from barber_jax.reports.run_record import load_record
from barber_jax.stages.rebuild import RebuildOptions

PERPLEXITY_FILE, ZERO_SHOT_FILE = "perplexity.json", "zero_shot.json"
"""Results that eval.perplexity and eval.zero_shot wrote with --json, in the same folder as run.json."""
REBUILD_OPTIONS = tuple(field.name for field in dataclasses.fields(RebuildOptions) if field.name != "rebuild")
"""Options that only the rebuild uses."""
OTHER_STAGE_OPTIONS = tuple(field.name for field in dataclasses.fields(BeyondOptions))
"""Options of the other stages."""
RECOVERY = "recover."
"""Prefix of the options of a recovery among the settings of a run."""
_NOT_COMPARED = (
    *("out", "masks", "sparse_ckpt", "overwrite", "resume", "verbose", "compilation_cache", "eval_text"),
    *("eval_dataset", "eval_windows", "save_start", "format", *PROCESS_OPTIONS),
)
_NOT_COMPARED_OF_A_RECOVERY = (*_NOT_COMPARED, "ckpt", "eval_every", "log_dir")
"""Options without effect on the result, or that another one stands for."""
_ZERO_SHOT = fields(
    {
        "format": text,
        "version": integer(1),
        "limit": optional(integer(1)),
        "tasks": mapping(fields({}, {"acc": number(0, 1)})),
    },
    {"mean": number(0, 1)},
)
"""Structure of the zero-shot file."""


class Windows(NamedTuple):
    """What a perplexity was measured on; perplexities on other windows of the same text are not comparable.

    Attributes:
        source: path or dataset name of the text.
        count: number of windows; None where the file does not say, as for `length`, tokens in each.
    """

    source: str
    count: int | None
    length: int | None

    @classmethod
    def of(cls, entry: dict) -> "Windows":
        """Those of an entry `perplexity` of run.json, or of a file of eval.perplexity."""
        return cls(entry["source"], entry.get("windows"), entry.get("length"))


@dataclass
class Run:
    """One folder of a study.

    Attributes:
        name: label in tables and plots.
        folder: where it was read from.
        record: content of run.json, for a recovered checkpoint that of the pruned one; None where there is none, as for
            a dense model.
        recovered: content of recover.json; None for a checkpoint that was not recovered.
        perplexity: windows of a text -> perplexity.
        zero_shot: task -> accuracy in [0, 1], and `mean` over the tasks.
        limit: largest number of documents evaluated for each zero-shot task; None for all.
    """

    name: str
    folder: Path
    record: dict | None
    perplexity: dict[Windows, float] = field(default_factory=dict)
    zero_shot: dict[str, float] = field(default_factory=dict)
    limit: int | None = None
    recovered: dict | None = None

    @property
    def latest(self) -> dict | None:
        """The record of the command that wrote the folder, recover.json or run.json; None where there is neither."""
        return self.recovered or self.record

    @property
    def masks(self) -> Path | None:
        """The mask file; None without run.json."""
        return self.folder / MASKS if self.record else None

    @property
    def start_masks(self) -> Path | None:
        """The file with the starting masks; None if it was not saved or no longer exists."""
        if self.record is None:
            return None
        options = self.record["options"]
        candidates = [self.folder / START_MASKS]
        candidates += [Path(os.path.expanduser(options["masks"]))] if options.get("masks") else []
        candidates += [Path(os.path.expanduser(options["sparse_ckpt"])) / MASKS] if options.get("sparse_ckpt") else []
        return next((path for path in candidates if path.is_file()), None)

    @property
    def settings(self) -> dict:
        """Options that determine the result, by name.

        A run that was given its starting masks has the method and the other options of the start from the run that made
        them. Options of the rebuild are None where there was none. The names of a recovery's own begin with `RECOVERY`.
        """
        return {**self._pruning_settings, **self._recovery_settings}

    @property
    def _recovery_settings(self) -> dict:
        options = self.recovered["options"] if self.recovered else {}
        return {RECOVERY + key: value for key, value in options.items() if key not in _NOT_COMPARED_OF_A_RECOVERY}

    @property
    def _pruning_settings(self) -> dict:
        if self.record is None:
            return {}
        options, start = self.record["options"], self.record.get("started_from")
        kept = {key: value for key, value in options.items() if key not in _NOT_COMPARED}
        if start:
            kept |= {name: start[name] for name in ("method", *START_OPTIONS) if name in start}
        # SparseGPT's starting masks are slightly sparser than --sparsity.
        kept["sparsity"] = round(kept["sparsity"], 4)
        if not options["rebuild"]:
            kept |= dict.fromkeys(REBUILD_OPTIONS)
        return kept

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole run, including the run that made its starting masks, and of all recoveries."""
        if self.latest is None:
            return None
        run = self.record or {}
        pruning = run.get("totals", {}).get("seconds", 0.0) + run.get("started_from", {}).get("seconds", 0.0)
        return pruning + self.seconds_recovering

    @property
    def seconds_recovering(self) -> float:
        """Seconds of the recovery, and of those before it."""
        if self.recovered is None:
            return 0.0
        return self.recovered["seconds"] + (self.recovered["source"].get("recovered") or {}).get("seconds", 0.0)

    @property
    def tokens_recovering(self) -> int | None:
        """Tokens that the recovery, and those before it, trained on; None for a checkpoint that was not recovered."""
        if self.recovered is None:
            return None
        return self.recovered["tokens"] + (self.recovered["source"].get("recovered") or {}).get("tokens", 0)

    @property
    def sparsity(self) -> float | None:
        """Fraction pruned of the prunable weights; None for a dense model."""
        if self.record:
            return self.record["totals"]["sparsity"]
        return self.recovered["sparsity"] if self.recovered else None

    @property
    def model(self) -> dict | None:
        """Identity of the model, to tell different models apart: its description and its number of prunable weights."""
        if self.record is None:
            return None
        return {**self.record["model"], "weights": self.record["totals"]["weights"]}


def load_run(folder: Path, name: str | None = None) -> Run:
    """Read a folder of a study.

    Args:
        name: label of the run; None: the folder's name.

    Raises:
        BarberError: the folder holds neither run.json nor recover.json nor evaluation results, or a file is damaged or
            of another version.
    """
    folder = expand(folder)
    perplexity_file, zero_shot_file = folder / PERPLEXITY_FILE, folder / ZERO_SHOT_FILE
    if not any(path.is_file() for path in (folder / RUN, folder / RECOVERED, perplexity_file, zero_shot_file)):
        raise BarberError(f"{folder}: holds no {RUN}; give a folder that barber_jax.prune or barber_jax.recover wrote")
    run = Run(name or folder.resolve().name, folder, None)
    if (folder / RECOVERED).is_file():
        run.recovered = read_recover_record(folder)
        run.record = run.recovered["source"]["run"]
    elif (folder / RUN).is_file():
        run.record = load_record(folder)
    if measured := (run.latest or {}).get("perplexity"):
        run.perplexity[Windows.of(measured)] = measured["perplexity"]
    if perplexity_file.is_file():
        run.perplexity |= {Windows.of(each): each["perplexity"] for each in read_results(perplexity_file)}
    if zero_shot_file.is_file():
        run.zero_shot, run.limit = _read_zero_shot(zero_shot_file)
    return run


def text_titles(runs: list[Run]) -> dict[Windows, str]:
    """Titles of everything that perplexities of the runs were measured on: the text, and where a text was measured on
    different windows their number and length."""
    measured = list(dict.fromkeys(windows for run in runs for windows in run.perplexity))
    several = Counter(windows.source for windows in measured)
    return {
        each: each.source if several[each.source] == 1 else f"{each.source} ({each.count} windows of {each.length})"
        for each in measured
    }


def _read_zero_shot(path: Path) -> tuple[dict[str, float], int | None]:
    """Accuracies of a file written by eval.zero_shot, with their `mean` where there is one, and the document limit."""
    try:
        content = documents.read(path)
        _ZERO_SHOT(content, "")
        if (content["format"], content["version"]) != ("barber_jax.zero_shot", 1):
            raise ValueError(f"format {content['format']}, version {content['version']}")
    except (OSError, ValueError) as error:
        raise BarberError(
            f"{path}: not a file written by this version's barber_jax.eval.zero_shot --json ({error}); measure again"
        ) from None
    accuracies = {name: task["acc"] for name, task in content["tasks"].items() if "acc" in task}
    return accuracies | ({"mean": content["mean"]} if "mean" in content else {}), content["limit"]


def load_runs(folders: list[Path]) -> list[Run]:
    """Read the folders of a study; folders with equal names are labelled with their paths.

    Raises:
        BarberError: see `load_run`.
    """
    runs = [load_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    return runs
