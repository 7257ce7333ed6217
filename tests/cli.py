"""Running the command lines from tests."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from barber_jax import prune, recover
from barber_jax.masks import read_masks
from barber_jax.run.loop import Pruning

ORACLES = Path(__file__).parent / "oracles"


def command(module: str, *arguments, devices: int = 1) -> subprocess.CompletedProcess:
    """`python -m barber_jax.<module>` in a process of its own, which sees this many virtual devices."""
    line = [sys.executable, "-m", f"barber_jax.{module}", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=600, env=environment(devices))


def environment(devices: int = 1) -> dict[str, str]:
    """Environment variables for a process that sees this many virtual devices."""
    count = "--xla_force_host_platform_device_count="
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(count)]
    return {**os.environ, "XLA_FLAGS": " ".join([*flags, f"{count}{devices}"])}


def prune_masks(out: Path, ckpt, ids, *options) -> dict[str, np.ndarray]:
    """Prune through the command line's own entry, in this process; HF name -> bool [out, in] mask."""
    arguments = ["--ckpt", ckpt, "--out", out, "--calibration", ids, *options]
    prune.run([str(argument) for argument in arguments])
    return masks_of(out)


def run_recovery(out: Path, ckpt, text, *options) -> dict:
    """Recover through the command line's own entry, in this process; the content of recover.json."""
    recover.run([str(each) for each in ["--ckpt", ckpt, "--out", out, "--text", text, *options]])
    return json.loads((out / "recover.json").read_text())


def masks_of(folder: Path, file: str = "masks.safetensors") -> dict[str, np.ndarray]:
    """HF name -> bool [out, in] mask of a pruned folder."""
    masks = read_masks(folder / file)
    return {name: masks.read(name) for name in masks.names()}


def agreement(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Fraction of all weights on which two models' masks agree."""
    assert one.keys() == other.keys()
    return sum((other[name] == mask).sum() for name, mask in one.items()) / sum(mask.size for mask in one.values())


@contextlib.contextmanager
def interrupted_after(blocks: int):
    """A pruning run in the body is interrupted, as by Ctrl-C, once so many blocks are committed."""
    result = Pruning._result

    def stop(pruning, index, *rest):
        if index + 1 == blocks:
            raise KeyboardInterrupt
        return result(pruning, index, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pruning, "_result", stop)
        yield
