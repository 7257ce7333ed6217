"""Compose recover.json, the record of a recovery: options, losses along the way, speed, origin; and read it back."""

import importlib.metadata
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from barber_jax.console import documents
from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand
from barber_jax.console.structure import WrongStructure
from barber_jax.convert.export import RECOVERED, RUN
from barber_jax.models.family import Model
from barber_jax.reports.recover_check import check_recover_record
from barber_jax.reports.run_record import (
    LIBRARIES,
    current_record,
    environment,
    load_record,
    model_entry,
    peak_memory,
    plain_options,
)

FORMAT, VERSION = "barber_jax.recover", 1
TRAINING_LIBRARIES = ("optax", "orbax-checkpoint", "grain")
"""Packages whose versions are recorded besides those of a pruning run."""
MAX_TRAINING = 1000
"""Most entries of `training`."""


def recover_record(
    options: Mapping[str, Any],
    model: Model,
    devices: list[jax.Device],
    *,
    commands: Mapping[str, Sequence[str] | None],
    source: Mapping[str, Any],
    sparsity: float,
    pattern: str,
    steps: int,
    tokens_per_step: int,
    training: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    best_step: int,
    written: str,
    movement: Sequence[Mapping[str, Any]],
    seconds: float,
    seconds_training: float,
    operations_per_token: float,
    matmul_flops: float | None = None,
    dense_perplexity: dict | None = None,
    start_perplexity: dict | None = None,
    perplexity: dict | None = None,
) -> dict:
    """Compose the content of recover.json.

    Args:
        options: options of the run by name; paths are converted to text.
        devices: devices used, of all processes.
        commands: `recover` -> options of barber_jax.recover, without --out, that reproduce the result; `prune` -> those
            of barber_jax.prune for the checkpoint that was recovered, or None where they are not known.
        source: from `source_entry`.
        sparsity, pattern: of the masks.
        steps: training steps done.
        tokens_per_step: tokens trained on in each step, over all processes.
        training: for every step `step` (from 1), `loss`, `kl` (None without a teacher), `cross_entropy`,
            `gradient_norm` and `rate`; at most `MAX_TRAINING` entries are kept, see `thinned`.
        evaluations: for each evaluation on held-out text `step` (0: before training), `loss`, `kl`, `cross_entropy` and
            `seconds`.
        best_step: step with the lowest held-out loss.
        written: `best` or `last`, the weights that are written.
        movement: for each block `block` and `weights`, matrix -> norm of its change over its norm before.
        seconds: wall time of the last attempt, and of the training steps of those before it.
        seconds_training: of the training steps and evaluations, in all attempts together.
        operations_per_token: floating-point operations for a trained token.
        matmul_flops: measured peak rate of matrix products over all devices, in operations per second.
        dense_perplexity, start_perplexity, perplexity: of the dense model, of the checkpoint before and after the
            recovery, if measured.
    """
    tokens = steps * tokens_per_step
    speed = tokens / seconds_training if seconds_training else 0.0
    extra = tuple(name for name in TRAINING_LIBRARIES if _is_installed(name))
    return {
        "format": FORMAT,
        "version": VERSION,
        "options": plain_options(options),
        "commands": {name: None if line is None else list(line) for name, line in {"prune": None, **commands}.items()},
        **environment(devices, (*LIBRARIES, *extra)),
        "processes": jax.process_count(),
        "model": model_entry(model),
        "source": dict(source),
        "sparsity": sparsity,
        "pattern": pattern,
        "steps": steps,
        "tokens": tokens,
        "tokens_per_step": tokens_per_step,
        "training": thinned(training),
        "evaluations": [dict(each) for each in evaluations],
        "best_step": best_step,
        "written": written,
        "movement": [dict(each) for each in movement],
        "dense_perplexity": dense_perplexity,
        "start_perplexity": start_perplexity,
        "perplexity": perplexity,
        "seconds": seconds,
        "seconds_training": seconds_training,
        "tokens_per_second": speed,
        "operations_per_token": operations_per_token,
        "matmul_flops": matmul_flops,
        "share_of_peak": speed * operations_per_token / matmul_flops if matmul_flops else None,
        "peak_memory": peak_memory(),
    }


def thinned(training: Sequence[Mapping[str, Any]], most: int = MAX_TRAINING) -> list[dict]:
    """At most `most` (3 or more) entries: the first, the last, and means over equal spans of the others.

    An entry for a span has the step of the span's last one.
    """
    if len(training) <= most:
        return [dict(each) for each in training]
    first, *between, last = training
    edges = [len(between) * index // (most - 2) for index in range(most - 1)]
    spans = (between[start:end] for start, end in itertools.pairwise(edges))
    return [dict(first), *map(_mean, spans), dict(last)]


def _mean(span: Sequence[Mapping[str, Any]]) -> dict:
    def mean(values: list) -> float | None:
        return None if None in values else sum(values) / len(values)

    return {key: mean([each[key] for each in span]) for key in span[-1]} | {"step": span[-1]["step"]}


def _is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def source_entry(checkpoint: str) -> dict:
    """Entry `source` of recover.json: the checkpoint that was recovered, and how it came about.

    `run` is its run.json, or None where there is none that can be read. Where the checkpoint was recovered itself,
    `run` is that of the checkpoint it began with, and `recovered` adds up all recoveries before this one.
    """
    entry: dict[str, Any] = {"checkpoint": str(checkpoint), "run": None}
    try:
        folder = expand(checkpoint)
        if (folder / RECOVERED).is_file():
            before = read_recover_record(folder)
            earlier = before["source"].get("recovered") or {}
            total = {key: before[key] + earlier.get(key, 0) for key in ("steps", "tokens", "seconds")}
            entry |= {"run": before["source"]["run"], "recovered": total}
        elif (folder / RUN).is_file():
            entry["run"] = load_record(folder)
    except (BarberError, OSError):
        # Not an error: a checkpoint need not come from barber_jax, and its record is no part of it.
        return {"checkpoint": str(checkpoint), "run": None}
    return entry


def read_recover_record(folder: Path) -> dict:
    """Read recover.json of a folder; `source.run` is converted to the current version of run.json.

    Raises:
        BarberError: the file is missing, damaged or of a newer version.
    """
    path = folder / RECOVERED
    if not path.is_file():
        raise BarberError(f"{path}: no such file; give a folder that barber_jax.recover wrote")
    try:
        record = documents.read(path)
    except (OSError, ValueError) as error:
        raise BarberError(f"{path}: not JSON ({error}); recover again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BarberError(f"{path}: not a record of barber_jax.recover; give a folder that it wrote")
    if type(record.get("version")) is not int or record["version"] != VERSION:
        raise BarberError(
            f"{path}: version {record.get('version')!r}, but this barber_jax reads version {VERSION}; "
            "read it with the version that wrote it, or recover again"
        )
    try:
        check_recover_record(record)
    except WrongStructure as error:
        raise BarberError(f"{path}: damaged: {error}; recover again") from None
    source = record["source"]
    if source["run"] is None:
        return record
    return {**record, "source": {**source, "run": current_record(source["run"], f"{path}: source.run")}}
