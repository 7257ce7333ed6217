"""run.json: every option, figure and version of a run, written by one process and read by others."""

import importlib.metadata
import json
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from barber_jax import __version__
from barber_jax.console.errors import BarberError
from barber_jax.convert.export import RUN
from barber_jax.models.family import Model

FORMAT, VERSION = "barber_jax.run", 2
RENAMED = {
    "apart_before": "validation_loss_before",
    "apart_after": "validation_loss_after",
    "revived": "regrown",
    "steps": "best_steps",
}
"""Key of version 1 -> key of version 2."""
KEYS = {"options": dict, "versions": dict, "device": dict, "model": dict, "blocks": list, "totals": dict}
"""Key -> type of what every run.json holds."""
ALLOCATION = ("allocate", "owl_lambda", "owl_m")
"""Options of how sparsity is allocated to blocks, where a criterion gives the starting masks."""
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "transformers", "datasets", "safetensors")


def environment(devices: list[jax.Device]) -> dict:
    """Versions of Python and libraries, and the devices used."""
    versions = {"barber_jax": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "versions": versions,
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
    }


def peak_memory() -> dict[str, int]:
    """Bytes: the most that this process held in host memory, and in device memory where the device says."""
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        peak["device_bytes"] = stats["peak_bytes_in_use"]
    return peak


def totals(blocks: list[dict]) -> dict:
    """Sums over blocks: weights, pruned weights, sparsity, swaps, losses, and seconds per stage."""
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
    """The run that made the given starting masks, where it left a readable run.json beside them."""
    given = Path(options["masks"]).parent if options["masks"] else options["sparse_ckpt"]
    if given is None:
        return None
    try:
        record = load_record(Path(given).expanduser())
        made, seconds = record["options"], record["totals"]["seconds"]
        allocation = {name: made[name] for name in ALLOCATION if name in made}
        rest = {"rebuild": made["rebuild"], "seconds": seconds}
        return {"folder": str(given), "method": made["method"], **allocation, **rest}
    except (BarberError, KeyError):
        # Read at the end of hours of work, which must not be lost for this.
        return None


def load_record(folder: Path) -> dict:
    """run.json of a folder, in today's form whatever version wrote it.

    Raises:
        BarberError: there is none, it is damaged, or of a newer version.
    """
    path = folder / RUN
    if not path.is_file():
        raise BarberError(f"{path}: no such file; give a folder that barber_jax.prune wrote")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BarberError(f"{path}: not JSON ({str(error)[:100]}); prune again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BarberError(f"{path}: not a record of barber_jax.prune; give a folder that it wrote")
    if record.get("version") not in range(1, VERSION + 1):
        raise BarberError(
            f"{path}: version {record.get('version')!r}, and this barber_jax reads up to {VERSION}; "
            "read it with the version that wrote it, or prune again"
        )
    missing = [key for key in KEYS if not isinstance(record.get(key), KEYS[key])]
    if missing:
        raise BarberError(f"{path}: {missing[0]!r} is missing or damaged; prune again")
    return record if record["version"] == VERSION else {**_renamed(record), "version": VERSION}


def _renamed(part: Any) -> Any:
    """A part of a record of version 1 with its keys renamed to version 2's; nothing else differs."""
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
) -> dict:
    """The content of run.json.

    Args:
        options: of the run, by name; paths become text.
        blocks: entries of the pruned blocks.
        seconds: wall time of the run.
        dense_perplexity, perplexity: of the dense model and of the result, where they were measured.
        allocation: fraction to prune in each block, where it is not the same in all.
    """
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "options": options,
        **environment(devices),
        "model": {"model_type": model.model_type, "blocks": model.layers, "hidden": model.hidden},
        "blocks": blocks,
        "totals": {**totals(blocks), "seconds": seconds},
        "peak_memory": peak_memory(),
    }
    extra = {"dense_perplexity": dense_perplexity, "perplexity": perplexity}
    extra |= {"started_from": provenance(options), "allocation": allocation}
    return record | {key: value for key, value in extra.items() if value}
