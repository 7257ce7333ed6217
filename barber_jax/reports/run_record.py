"""Compose run.json, the record of a run: options, versions, devices and results; and read it back."""

import importlib.metadata
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from barber_jax import __version__
from barber_jax.console import documents
from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand
from barber_jax.console.structure import WrongStructure
from barber_jax.convert.export import RUN
from barber_jax.models.family import Model
from barber_jax.reports.record_check import START_OPTIONS, check_record

FORMAT, VERSION = "barber_jax.run", 2
RENAMED = {
    "apart_before": "validation_loss_before",
    "apart_after": "validation_loss_after",
    "revived": "regrown",
    "steps": "best_steps",
}
"""Key of version 1 -> key of version 2."""
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "transformers", "datasets", "safetensors")
"""Packages whose versions are recorded."""


def environment(devices: list[jax.Device], libraries: Sequence[str] = LIBRARIES) -> dict:
    """Entries `versions` and `device` of run.json: versions of Python and libraries, and the devices used."""
    versions = {"barber_jax": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in libraries}
    return {
        "versions": versions,
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
    }


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name as JSON can hold them: paths become text."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}


def model_entry(model: Model) -> dict:
    """Entry `model` of run.json."""
    return {"model_type": model.model_type, "blocks": model.layers, "hidden": model.hidden}


def peak_memory() -> dict[str, int]:
    """Peak host memory of this process and, where the device reports it, peak device memory, in bytes."""
    # ru_maxrss is in kilobytes on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        peak["device_bytes"] = stats["peak_bytes_in_use"]
    return peak


def totals(blocks: list[dict]) -> dict:
    """Entry `totals` of run.json: weights, pruned weights, swaps, losses and seconds per stage, summed over blocks."""
    subs = [sub for block in blocks for sub in block["sub_blocks"]]
    matrices = [matrix for sub in subs for matrix in sub["matrices"].values()]
    size, pruned = sum(m["size"] for m in matrices), sum(m["pruned"] for m in matrices)
    seconds: dict[str, float] = {}
    for block in blocks:
        for stage, spent in block["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    out = {"weights": size, "pruned": pruned, "sparsity": pruned / size, "seconds_per_stage": seconds}
    for figure in ("swaps", "loss_before", "loss_after", "validation_loss_before", "validation_loss_after"):
        if figure in subs[0]:
            out[figure] = sum(sub[figure] for sub in subs)
    return out


def provenance(options: dict) -> dict | None:
    """Entry `started_from` of run.json: the run that produced the given starting masks.

    None if no masks were given, or if there is no readable run.json beside them.
    """
    folder = Path(options["masks"]).parent if options["masks"] else options["sparse_ckpt"]
    if folder is None:
        return None
    try:
        record = load_record(expand(folder))
        source, seconds = record["options"], record["totals"]["seconds"]
        options = {name: source[name] for name in START_OPTIONS if name in source}
        rest = {"rebuild": source["rebuild"], "seconds": seconds}
        return {"folder": str(folder), "method": source["method"], **options, **rest}
    except (BarberError, KeyError):
        # Not an error: this is read at the end of a long run, whose result must not be lost.
        return None


def load_record(folder: Path) -> dict:
    """Read run.json of a folder and convert it to the current version.

    Raises:
        BarberError: the file is missing, damaged or of a newer version.
    """
    path = folder / RUN
    if not path.is_file():
        raise BarberError(f"{path}: no such file; give a folder that barber_jax.prune wrote")
    try:
        content = documents.read(path)
    except (OSError, ValueError) as error:
        raise BarberError(f"{path}: not JSON ({error}); prune again") from error
    return current_record(content, str(path))


def current_record(content: Any, place: str) -> dict:
    """Check the content of run.json and convert it to the current version.

    Args:
        place: where it was read, for messages.

    Raises:
        BarberError: it is damaged or of a newer version.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BarberError(f"{place}: not a record of barber_jax.prune; give a folder that it wrote")
    if type(content.get("version")) is not int or content["version"] not in range(1, VERSION + 1):
        raise BarberError(
            f"{place}: version {content.get('version')!r}, but this barber_jax reads versions up to {VERSION}; "
            "read it with the version that wrote it, or prune again"
        )
    current = content if content["version"] == VERSION else {**_renamed(content), "version": VERSION}
    try:
        check_record(current)
    except WrongStructure as error:
        raise BarberError(f"{place}: damaged: {error}; prune again") from None
    return current


def _renamed(part: Any) -> Any:
    """Rename the keys of (a part of) a record from version 1 to version 2; the versions differ in nothing else."""
    if isinstance(part, dict):
        return {RENAMED.get(key, key): _renamed(value) for key, value in part.items()}
    return [_renamed(each) for each in part] if isinstance(part, list) else part


def run_record(
    options: Mapping[str, Any],
    model: Model,
    devices: list[jax.Device],
    blocks: list[dict],
    seconds: float,
    *,
    dense_perplexity: dict | None = None,
    perplexity: dict | None = None,
    allocation: list[float] | None = None,
    written_calibration: dict | None = None,
) -> dict:
    """Compose the content of run.json.

    Args:
        options: options of the run by name; paths are converted to text.
        devices: devices used.
        blocks: entries of the pruned blocks.
        seconds: wall time of the run.
        dense_perplexity, perplexity: of the dense and the pruned model, if measured.
        allocation: fraction to prune in each block, if allocated by OWL.
        written_calibration: how the model has written calibration samples, if it has.
    """
    options = plain_options(options)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "options": options,
        **environment(devices),
        "model": model_entry(model),
        "blocks": blocks,
        "totals": {**totals(blocks), "seconds": seconds},
        "peak_memory": peak_memory(),
    }
    extra = {"dense_perplexity": dense_perplexity, "perplexity": perplexity}
    extra |= {"started_from": provenance(options), "allocation": allocation}
    extra["written_calibration"] = written_calibration
    return record | {key: value for key, value in extra.items() if value}
