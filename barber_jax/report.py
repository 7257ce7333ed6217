"""run.json: every option, figure and version of a run, for a person or a script to read afterwards."""

import dataclasses
import importlib.metadata
import platform
import resource
import sys
from pathlib import Path

import jax

from barber_jax import __version__
from barber_jax.config import PruneConfig
from barber_jax.models.family import Model

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
    """Sums over blocks: weights, pruned weights, sparsity, swaps, and seconds per stage."""
    subs = [sub for block in blocks for sub in block["sub_blocks"]]
    matrices = [matrix for sub in subs for matrix in sub["matrices"].values()]
    size, pruned = sum(m["size"] for m in matrices), sum(m["pruned"] for m in matrices)
    seconds: dict[str, float] = {}
    for block in blocks:
        for stage, spent in block["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    out = {"weights": size, "pruned": pruned, "sparsity": pruned / size, "seconds_per_stage": seconds}
    if "swaps" in subs[0]:
        out["swaps"] = sum(sub["swaps"] for sub in subs)
        for when in ("loss_before", "loss_after"):
            out[when] = sum(sub[when] for sub in subs)
    return out


def run_record(
    config: PruneConfig,
    sparsity: float,
    model: Model,
    devices: list[jax.Device],
    blocks: list[dict],
    seconds: float,
    perplexity: dict | None,
) -> dict:
    """The content of run.json."""
    options = {
        key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(config).items()
    }
    options |= {"sparsity": sparsity, "pattern": str(config.sparsity_pattern)}
    record = {
        "format": "barber_jax.run",
        "version": 1,
        "options": options,
        **environment(devices),
        "model": {"model_type": model.model_type, "blocks": model.layers, "hidden": model.hidden},
        "blocks": blocks,
        "totals": {**totals(blocks), "seconds": seconds},
        "peak_memory": peak_memory(),
    }
    return record | ({"perplexity": perplexity} if perplexity else {})
