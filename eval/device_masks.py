"""Prunes a packaged tiny model on this device and compares the masks with those that a CPU gave (of device_check).

    python -m barber_jax.eval.device_masks --json FILE [--compute-dtype bfloat16] [--matmul-precision high]

The reference, made on a CPU in float32, lies in eval/reference/. `--record` makes it anew there: after an intended
change of the masks.
"""

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from rich.progress import track

from barber_jax.config import PruneConfig
from barber_jax.console.command import parse
from barber_jax.console.errors import BarberError, exit_with_one_line
from barber_jax.console.outputs import output_file, write_whole
from barber_jax.convert.export import MASKS
from barber_jax.devices.options import ComputeDtype, MatmulPrecision
from barber_jax.devices.settings import prepare_jax
from barber_jax.eval import synthetic
from barber_jax.masks.mask_file import read_masks
from barber_jax.prune import prune
from barber_jax.reports.run_record import environment

REFERENCE = Path(__file__).parent / "reference"
MODEL, IDS = REFERENCE / "model", REFERENCE / "ids.npy"
SHAPE = synthetic.Shape(blocks=3, hidden=64, intermediate=176, heads=4, kv_heads=2, vocabulary=256)
SAMPLES, LENGTH = 16, 64
SETTINGS = {
    "wanda, no rebuild": {"method": "wanda", "rebuild": False},
    "magnitude": {"method": "magnitude"},
    "wanda, output1": {"method": "wanda", "alpha": 0.1},
    "wanda, 2:4": {"method": "wanda", "alpha": 0.1, "pattern": "2:4", "sparsity": None},
    "sparsegpt, input1": {"method": "sparsegpt", "granularity": "input1", "alpha": 0.1},
    "wanda, refine 10": {"method": "wanda", "rebuild": False, "refine": 10},
}
"""What is compared -> options."""


@dataclass(frozen=True, kw_only=True)
class MasksConfig:
    """Compare the masks of a packaged tiny model with those that a CPU gave."""

    json: Path | None = None
    """File for the results."""
    compute_dtype: ComputeDtype = "float32"
    """As for barber_jax.prune."""
    matmul_precision: MatmulPrecision = "highest"
    """As for barber_jax.prune."""
    record: bool = False
    """Make the reference anew, in the package itself."""

    def __post_init__(self):
        if self.record == (self.json is not None):
            raise BarberError("give either --json FILE, or --record to make the reference anew")


def reference_file(setting: str) -> Path:
    """The mask file of a setting."""
    return REFERENCE / f"{setting.replace(', ', '_').replace(' ', '_').replace(':', '')}.safetensors"


def prune_with(setting: str, out: Path, config: MasksConfig) -> Path:
    """Prune the packaged model; returns the mask file.

    Args:
        setting: a key of SETTINGS.
        out: folder to create.
    """
    options = {
        "ckpt": str(MODEL),
        "out": out,
        "calibration": str(IDS),
        "samples": SAMPLES,
        "length": LENGTH,
        "sparsity": 0.5,
        "compute_dtype": config.compute_dtype,
        "matmul_precision": config.matmul_precision,
    }
    chosen = {key: value for key, value in (options | SETTINGS[setting]).items() if value is not None}
    prune(PruneConfig(**chosen))
    return out / MASKS


def agreement(found: Path, reference: Path) -> dict:
    """Share of the weights on which two mask files agree: of all, and of the matrix where it is least."""
    ours, theirs = read_masks(found), read_masks(reference)
    if ours.shapes != theirs.shapes:
        raise BarberError(f"{reference}: masks of another model; make the reference anew with --record")
    same = {name: int(np.sum(ours.read(name) == theirs.read(name))) for name in theirs.names()}
    sizes = {name: int(np.prod(shape)) for name, shape in theirs.shapes.items()}
    return {
        "weights": sum(sizes.values()),
        "agreement": sum(same.values()) / sum(sizes.values()),
        "lowest_matrix": min(same[name] / sizes[name] for name in sizes),
    }


def compare(config: MasksConfig, file: Path) -> dict:
    """Content of --json, the given file; written again after every setting."""
    content = environment(jax.devices())
    content |= {"compute_dtype": config.compute_dtype, "matmul_precision": config.matmul_precision, "settings": {}}
    with tempfile.TemporaryDirectory(prefix="barber_jax_device_masks_") as temporary:
        for index, setting in enumerate(SETTINGS):
            start = time.perf_counter()
            found = prune_with(setting, Path(temporary) / str(index), config)
            entry = {"seconds": time.perf_counter() - start, **agreement(found, reference_file(setting))}
            content["settings"][setting] = entry
            write_whole(file, json.dumps(content, indent=1) + "\n")
    return content


def record(config: MasksConfig) -> None:
    """Write the tiny model, its calibration ids and the masks of every setting."""
    if jax.default_backend() != "cpu":
        raise BarberError("--record: the reference is that of a CPU; set JAX_PLATFORMS=cpu")
    shutil.rmtree(MODEL, ignore_errors=True)
    synthetic.write(MODEL, SHAPE)
    np.save(IDS, np.random.default_rng(1).integers(0, SHAPE.vocabulary, (SAMPLES, LENGTH), np.uint8))
    with tempfile.TemporaryDirectory(prefix="barber_jax_device_masks_") as temporary:
        for index, setting in enumerate(track(SETTINGS, "settings")):
            shutil.copyfile(prune_with(setting, Path(temporary) / str(index), config), reference_file(setting))


def run(arguments: list[str] | None = None) -> None:
    """Command line: write the results to --json, or the reference."""
    config = parse(MasksConfig, "barber_jax.eval.device_masks", arguments)
    prepare_jax()
    if config.record:
        record(config)
        return
    with output_file(config.json) as file:
        compare(config, file)


if __name__ == "__main__":
    exit_with_one_line(run)
