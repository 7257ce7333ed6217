"""The examples of docs/contributing.md do what they say."""

import re
import types
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import transformers
from checkpoints import BASE, FAMILIES, assert_same_logits, write_model
from cli import ORACLES, prune_masks

from barber_jax import config, models
from barber_jax.criteria import CRITERIA

PAGE = (Path(__file__).parents[2] / "docs" / "contributing.md").read_text(encoding="utf-8")


def example(path: str) -> types.ModuleType:
    """The module that the page shows for a file."""
    (code,) = re.findall(rf"```python\n# {re.escape(path)}\n(.*?)```", PAGE, re.DOTALL)
    module = types.ModuleType("example")
    exec(compile(code, path, "exec"), module.__dict__)
    return module


@pytest.fixture
def ria(monkeypatch):
    """RIA registered by the three lines."""
    monkeypatch.setitem(CRITERIA, "ria", example("barber_jax/criteria/ria.py").CRITERION)
    monkeypatch.setitem(config.PUBLISHED, "ria", ("output1", 0.01))
    method = Literal["magnitude", "wanda", "sparsegpt", "ria"]
    monkeypatch.setitem(config.PruneConfig.__annotations__, "method", method | None)
    monkeypatch.setattr(config.PruneConfig.__dataclass_fields__["method"], "type", method | None)


@pytest.mark.parametrize("pattern", [[], ["--pattern", "2:4"]])
def test_a_criterion(ria, tmp_path, pattern):
    quick = ["--samples", 4, "--length", 32, *pattern]
    made = {}
    for method in ("ria", "wanda"):
        line = ["--method", method, *quick]
        made[method] = prune_masks(tmp_path / method, ORACLES / "llama", ORACLES / "llama/calibration_ids.npy", *line)
    for mask in made["ria"].values():
        np.testing.assert_array_equal(mask.sum(axis=1), mask.shape[1] // 2)
    assert any((mask != made["wanda"][name]).any() for name, mask in made["ria"].items())


def test_a_model_family(tmp_path, monkeypatch):
    build = example("barber_jax/models/seed_oss.py").build
    monkeypatch.setitem(models.FAMILIES, "seed_oss", (build, "SeedOssForCausalLM"))
    classes = transformers.SeedOssConfig, transformers.SeedOssForCausalLM
    monkeypatch.setitem(FAMILIES, "seed_oss", (*classes, {**BASE, "head_dim": 8}))
    for out_bias in (False, True):
        folder = tmp_path / str(out_bias)
        assert_same_logits(folder, write_model(folder, "seed_oss", attention_out_bias=out_bias))


def test_the_examples_are_short():
    for path in ("barber_jax/criteria/ria.py", "barber_jax/models/seed_oss.py"):
        (code,) = re.findall(rf"```python\n# {re.escape(path)}\n(.*?)```", PAGE, re.DOTALL)
        body = [line for line in code.splitlines() if line.strip() and "import" not in line]
        assert len(body) <= 10, path
