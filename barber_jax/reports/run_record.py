"""run.json: every option, figure and version of a run, for a person or a script to read afterwards."""

import dataclasses
import importlib.metadata
import json
import platform
import resource
import sys
from pathlib import Path

import jax
import numpy as np

from barber_jax import __version__
from barber_jax.config import PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.convert.export import RUN
from barber_jax.models.family import Model

FORMAT, VERSION = "barber_jax.run", 1
KEYS = {"options": dict, "versions": dict, "device": dict, "model": dict, "blocks": list, "totals": dict}
"""What every run.json holds, and as what."""
ALLOTMENT = ("allocate", "owl_lambda", "owl_m")
"""Options that say how sparsity is spread over blocks, where a criterion gives the starting masks."""
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
    for figure in ("swaps", "loss_before", "loss_after", "apart_before", "apart_after"):
        if figure in subs[0]:
            out[figure] = sum(sub[figure] for sub in subs)
    return out


def written_maps(maps: np.ndarray) -> dict[str, str]:
    """`rebuild.outlier_maps` of a matrix as run.json holds it: a line of text for each mask, `;` between outputs."""
    rows = [";".join(" ".join(map(str, row)) for row in each.tolist()) for each in maps]
    return dict(zip(("before", "after"), rows, strict=True))


def read_map(text: str) -> np.ndarray:
    """One map of `written_maps`, int [outputs, inputs]."""
    return np.array([[int(count) for count in row.split()] for row in text.split(";")])


def provenance(config: PruneConfig) -> dict | None:
    """The run that the starting masks were taken from, where it left a run.json beside them that can be read."""
    given = config.masks.parent if config.masks else config.sparse_ckpt
    if given is None:
        return None
    try:
        record = load_record(Path(given).expanduser())
        options, seconds = record["options"], record["totals"]["seconds"]
        made = {name: options[name] for name in ALLOTMENT if name in options}
        rest = {"rebuild": options["rebuild"], "seconds": seconds}
        return {"folder": str(given), "method": options["method"], **made, **rest}
    except (BarberError, KeyError):
        # Asked at the end of hours of work, which must not be lost for this.
        return None


def load_record(folder: Path) -> dict:
    """run.json of a folder.

    Raises:
        BarberError: there is none, it is damaged, or of another version.
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
    if record.get("version") != VERSION:
        raise BarberError(
            f"{path}: version {record.get('version')!r}, and this barber_jax reads {VERSION}; "
            "read it with the version that wrote it, or prune again"
        )
    missing = [key for key in KEYS if not isinstance(record.get(key), KEYS[key])]
    if missing:
        raise BarberError(f"{path}: {missing[0]!r} is missing or damaged; prune again")
    return record


def run_record(
    config: PruneConfig,
    sparsity: float,
    model: Model,
    devices: list[jax.Device],
    blocks: list[dict],
    seconds: float,
    perplexity: dict | None,
    allocation: list[float] | None = None,
) -> dict:
    """The content of run.json; `allocation` is the fraction to prune in each block where it is not the same in all."""
    options = {
        key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(config).items()
    }
    options |= {"sparsity": sparsity, "pattern": str(config.sparsity_pattern)}
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
    extra = {"perplexity": perplexity, "started_from": provenance(config), "allocation": allocation}
    return record | {key: value for key, value in extra.items() if value}
