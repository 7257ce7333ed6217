"""Finished runs as a study sees them: run.json and what was measured of the checkpoint afterwards."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from barber_jax.console.errors import BarberError
from barber_jax.convert.export import MASKS, RUN, START_MASKS
from barber_jax.eval.perplexity import read_results
from barber_jax.reports.run_record import ALLOCATION, load_record

PERPLEXITY, ZERO_SHOT = "perplexity.json", "zero_shot.json"
"""Beside run.json: what eval.perplexity and eval.zero_shot wrote with --json."""
REBUILD = ("granularity", "alpha", "metric", "retain_reconstruction")
"""Options that only a rebuild looks at."""
STAGES = (
    *("token_weighting", "target", "rounds", "refine"),
    *("reconstruct", "reconstruct_rate", "reconstruct_batch", "reconstruct_scope"),
)
"""Options of what else follows the starting masks."""


@dataclass
class Run:
    """One folder of a study.

    Attributes:
        name: what tables call it.
        record: the content of run.json; None for a folder with measurements alone, as of a dense model.
        perplexity: source -> perplexity.
        zero_shot: task -> accuracy, and their `mean`.
        limit: documents of each zero-shot task at most; None for all.
    """

    name: str
    folder: Path
    record: dict | None
    perplexity: dict[str, float] = field(default_factory=dict)
    zero_shot: dict[str, float] = field(default_factory=dict)
    limit: int | None = None

    @property
    def masks(self) -> Path | None:
        """The mask file."""
        return self.folder / MASKS if self.record else None

    @property
    def start_masks(self) -> Path | None:
        """The masks that the rebuild started from, where they are still to be had."""
        if self.record is None:
            return None
        options = self.record["options"]
        places = [self.folder / START_MASKS]
        places += [Path(options["masks"]).expanduser()] if options.get("masks") else []
        places += [Path(options["sparse_ckpt"]).expanduser() / MASKS] if options.get("sparse_ckpt") else []
        return next((place for place in places if place.is_file()), None)

    @property
    def settings(self) -> dict:
        """The options that decide what the run computes, with the starting criterion whatever way it came."""
        if self.record is None:
            return {}
        options, start = self.record["options"], self.record.get("started_from")
        skipped = ("out", "masks", "sparse_ckpt", "overwrite", "resume", "verbose", "compilation_cache", "eval_text")
        skipped += ("eval_dataset", "eval_windows", "save_start", "coordinator", "processes", "process", "format")
        kept = {key: value for key, value in options.items() if key not in skipped}
        if start:
            kept |= {name: start[name] for name in ("method", *ALLOCATION) if name in start}
        # What sparsegpt's starting mask has is a hair more than what was asked for.
        kept["sparsity"] = round(kept["sparsity"], 4)
        if not options["rebuild"]:
            kept |= dict.fromkeys(REBUILD)
        return kept

    @property
    def seconds(self) -> float | None:
        """Of the whole run, and of the one that made its starting masks."""
        if self.record is None:
            return None
        return self.record["totals"]["seconds"] + self.record.get("started_from", {}).get("seconds", 0.0)

    @property
    def model(self) -> dict | None:
        """What tells one model from another: its description and the number of weights looked at."""
        if self.record is None:
            return None
        return {**self.record["model"], "weights": self.record["totals"]["weights"]}


def load_run(folder: Path, name: str | None = None) -> Run:
    """Read a folder.

    Raises:
        BarberError: it holds neither a run nor measurements, or they are damaged or of another version.
    """
    folder = folder.expanduser()
    measured = [folder / name for name in (PERPLEXITY, ZERO_SHOT)]
    if not (folder / RUN).is_file() and not any(path.is_file() for path in measured):
        raise BarberError(f"{folder}: holds no {RUN}; give a folder that barber_jax.prune wrote")
    record = load_record(folder) if (folder / RUN).is_file() else None
    run = Run(name or folder.resolve().name, folder, record)
    if record and "perplexity" in record:
        run.perplexity[record["perplexity"]["source"]] = record["perplexity"]["perplexity"]
    if measured[0].is_file():
        run.perplexity |= {each["source"]: each["perplexity"] for each in read_results(measured[0])}
    if measured[1].is_file():
        run.zero_shot, run.limit = _zero_shot(measured[1])
    return run


def _zero_shot(path: Path) -> tuple[dict[str, float], int | None]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["version"]) == ("barber_jax.zero_shot", 1):
            accuracies = {name: task["acc"] for name, task in content["tasks"].items() if "acc" in task}
            return accuracies | ({"mean": content["mean"]} if "mean" in content else {}), content["limit"]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise BarberError(f"{path}: not what this version's barber_jax.eval.zero_shot --json writes; measure again")


def load_runs(folders: list[Path]) -> list[Run]:
    """Read folders; those of the same name are called by their paths."""
    runs = [load_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    return runs
