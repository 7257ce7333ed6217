"""Operation counts against counts by hand, and the benchmark's command line."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from cli import command
from models import BASE, write_model

from barber_jax.config import PruneConfig
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.eval import operations
from barber_jax.models import build_model

# 2 samples of 8 tokens, hidden 32, intermediate 48, 4 heads of 8; LLaMA has 2 key-value heads.
TOKENS = 16
CAUSAL = 2 * 4 * 32 * (8 * 9 // 2)
COUNTS = {
    "llama": {
        "start": 2 * TOKENS * (32 * 32 + 32 * 16 * 2 + 32 * 32 + 2 * 32 * 48) + CAUSAL,
        "propagate": 107520 + 147456,
        "self_attn gradient": 2 * 107520 + 98304 + 32768 + 2 * CAUSAL,
        "self_attn propagate": 107520,
        "mlp gradient": 3 * 147456 + 49152,
        "mlp propagate": 147456,
    },
    "opt": {
        "start": 2 * TOKENS * (4 * 32 * 32 + 32 * 48) + CAUSAL,
        "propagate": 140288 + 98304,
        "self_attn gradient": 2 * 140288 + 131072 + 32768 + 2 * CAUSAL,
        "self_attn propagate": 140288,
        "mlp gradient": 3 * 98304 + 49152,
        "mlp propagate": 98304,
    },
}


def model_of(folder):
    return build_model(open_checkpoint(str(folder)).config, jnp.dtype("float32"))


@pytest.mark.parametrize("family", list(COUNTS))
def test_operations_of_a_block(family, tmp_path):
    write_model(tmp_path / "dense", family)
    config = PruneConfig("dense", Path("out"), samples=2, length=8)
    model = model_of(tmp_path / "dense")
    assert operations.of_block(model, config, last=False) == COUNTS[family]
    whole = operations.of_run(model, config)
    # Nobody looks at stream A after the last of the two blocks.
    assert whole["propagate"] == COUNTS[family]["propagate"]
    assert whole["mlp gradient"] == 2 * COUNTS[family]["mlp gradient"]


def test_stages_that_are_not_run_count_nothing(tmp_path):
    write_model(tmp_path / "dense")
    model = model_of(tmp_path / "dense")
    magnitude = PruneConfig("dense", Path("out"), samples=2, length=8, method="magnitude", rebuild=False)
    assert set(operations.of_block(model, magnitude, last=False).values()) == {0}
    sparsegpt = PruneConfig("dense", Path("out"), samples=2, length=8, method="sparsegpt")
    more = operations.of_block(model, sparsegpt, last=True)["start"] - COUNTS["llama"]["start"]
    grams = 2 * TOKENS * (32**2 * 3 + 48**2) + 3 * (2 * 32**3 // 3) + 2 * 48**3 // 3
    assert more == grams + 32**2 * (32 + 16 + 16 + 32 + 48 + 48) + 48**2 * 32


def test_command_line(tmp_path):
    write_model(tmp_path / "dense")
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (2, 8)))
    options = ["--ckpt", tmp_path / "dense", "--out", tmp_path / "out", "--calibration", tmp_path / "ids.npy"]
    options += ["--samples", 2, "--length", 8, "--json", tmp_path / "figures.json", "--overwrite"]
    # Another cache than the other tests': the first run must find it empty.
    options += ["--compilation-cache", tmp_path / "compiled"]
    runs = []
    for _ in range(2):
        said = command("eval.benchmark", *options)
        assert said.returncode == 0, said.stderr
        assert "mlp gradient" in said.stdout and "peak" in said.stdout
        runs.append(json.loads((tmp_path / "figures.json").read_text()))
    for figures in runs:
        assert figures["stages"].keys() >= COUNTS["llama"].keys()
        total = sum(stage["operations"] for stage in figures["stages"].values())
        assert figures["whole"]["operations"] == total > 0
        assert 0 < sum(stage["seconds"] for stage in figures["stages"].values()) < figures["whole"]["seconds"]
        assert figures["peak"]["flops"] == max(figures["peak"]["shapes"].values())
    assert runs[0]["compilation"]["cache"]["misses"] > 10
    # What was compiled once is never compiled again.
    assert runs[1]["compilation"]["cache"]["misses"] == 0
    assert runs[1]["compilation"]["cache"]["hits"] > 10


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--ckpt", "nowhere"], "missing --out"),
        (["--ckpt", "nowhere", "--out", "out", "--mesh", "data=2"], "--mesh"),
        (["--ckpt", "nowhere", "--out", "out", "--json", "/"], "--json"),
    ],
)
def test_bad_options(options, complaint, tmp_path):
    said = command("eval.benchmark", *options)
    assert said.returncode == 2 and complaint in said.stderr and said.stderr.count("\n") == 1
