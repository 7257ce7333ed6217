"""Running the command lines from tests."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from barber_jax import prune
from barber_jax.masks.mask_file import read_masks

ORACLES = Path(__file__).parent / "oracles"


def command(module: str, *arguments, devices: int = 1) -> subprocess.CompletedProcess:
    """`python -m barber_jax.<module>` in a process of its own, which sees so many virtual devices."""
    line = [sys.executable, "-m", f"barber_jax.{module}", *map(str, arguments)]
    environment = {
        **os.environ,
        **({"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} if devices > 1 else {}),
    }
    return subprocess.run(line, capture_output=True, text=True, timeout=600, env=environment)


def prune_masks(out: Path, ckpt, ids, *options) -> dict[str, np.ndarray]:
    """Prune through the command line's own entry, in this process; HF name -> bool [out, in] mask."""
    arguments = ["--ckpt", ckpt, "--out", out, "--calibration", ids, *options]
    prune.run([str(argument) for argument in arguments])
    masks = read_masks(out / "masks.safetensors")
    return {name: masks.read(name) for name in masks.names()}
