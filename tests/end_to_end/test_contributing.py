"""The examples of docs/contributing.md do what they say: files are added, and lines edited, in a copy of the code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import BASE, FAMILIES, assert_same_logits, write_reference
from cli import ORACLES, prune_masks

from barber_jax import models
from barber_jax.masks import read_masks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")


def example(path: str) -> str:
    """The file that the page shows."""
    (code,) = re.findall(rf"```python\n# {re.escape(path)}\n(.*?)```", PAGE, re.DOTALL)
    return code


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the code, run from its root without being installed."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("barber_jax", "convert", "eval"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def prune_in(copy, out, *options):
    """Masks that the copy's `python -m barber_jax.prune` makes of the small oracle model."""
    given = ["--ckpt", ORACLES / "llama", "--calibration", ORACLES / "llama/calibration_ids.npy", "--out", out]
    line = [sys.executable, "-m", "barber_jax.prune", *given, "--samples", "4", "--length", "32", *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, line)), cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    masks = read_masks(out / "masks.safetensors")
    return {name: masks.read(name) for name in masks.names()}


def add(copy, path, table, line):
    """Write the page's file for a path, and a line into a table: what the page says to do."""
    (copy / path).write_text(example(path), encoding="utf-8")
    place = copy / table
    place.write_text(line(place.read_text(encoding="utf-8")), encoding="utf-8")


def test_a_criterion(copy, tmp_path):
    def line(text):
        text = text.replace("magnitude, sparsegpt, wanda\n", "magnitude, ria, sparsegpt, wanda\n")
        return text.replace(
            '    "wanda": wanda.CRITERION,\n', '    "wanda": wanda.CRITERION,\n    "ria": ria.CRITERION,\n'
        )

    assert '`"ria": ria.CRITERION`' in PAGE
    add(copy, "barber_jax/criteria/ria.py", "barber_jax/criteria/__init__.py", line)
    made = {
        name: prune_in(copy, tmp_path / name, *options)
        for name, options in {
            "ria": ["--method", "ria"],
            "ria 2:4": ["--method", "ria", "--pattern", "2:4"],
        }.items()
    }
    small = ["--samples", 4, "--length", 32]
    wanda = prune_masks(tmp_path / "wanda", ORACLES / "llama", ORACLES / "llama/calibration_ids.npy", *small)
    for name, mask in made["ria"].items():
        np.testing.assert_array_equal(mask.sum(axis=1), mask.shape[1] // 2)
        assert (made["ria 2:4"][name].reshape(-1, 4).sum(axis=1) == 2).all()
    assert any((mask != wanda[name]).any() for name, mask in made["ria"].items())


def test_a_model_family(tmp_path, monkeypatch):
    module = {}
    exec(compile(example("barber_jax/models/seed_oss.py"), "seed_oss.py", "exec"), module)
    monkeypatch.setitem(models.FAMILIES, "seed_oss", (module["build"], "SeedOssForCausalLM"))
    monkeypatch.setitem(FAMILIES, "seed_oss", ("SeedOssConfig", "SeedOssForCausalLM", {**BASE, "head_dim": 8}))
    for out_bias in (False, True):
        folder = tmp_path / str(out_bias)
        assert_same_logits(folder, write_reference(folder, "seed_oss", attention_out_bias=out_bias))


def test_the_examples_are_short():
    for path in ("barber_jax/criteria/ria.py", "barber_jax/models/seed_oss.py"):
        body = [line for line in example(path).splitlines() if line.strip() and "import" not in line]
        assert len(body) <= 10, path
