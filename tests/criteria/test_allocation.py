"""Options of the allocation, and `--allocate slope`: a sparsity that rises from block to block."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import BASE, write_model
from cli import prune_masks

from barber_jax.config import PruneConfig
from barber_jax.console.errors import BarberError
from barber_jax.criteria import allocation


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"owl_lambda": 0.1}, "--owl-lambda 0.1 needs --allocate owl"),
        ({"owl_m": 5.0}, "--owl-m 5 needs --allocate owl"),
        ({"allocate": "owl", "owl_lambda": 0.0}, "--owl-lambda 0 is outside (0, 0.5]"),
        ({"allocate": "owl", "owl_lambda": 0.6}, "--owl-lambda 0.6 is outside"),
        ({"allocate": "owl", "owl_lambda": float("nan")}, "--owl-lambda nan is outside"),
        ({"allocate": "owl", "owl_m": 0.0}, "--owl-m 0 must be a finite number above 0"),
        ({"allocate": "owl", "owl_m": float("inf")}, "--owl-m inf must be a finite number"),
        ({"allocate": "owl", "owl_m": 1e300}, "--owl-m 1e+300 must be a finite number above 0, within float32"),
        ({"allocate": "owl", "slope_beta": 0.01}, "--slope-beta 0.01 needs --allocate slope"),
        ({"allocate": "slope", "slope_beta": 0.01, "owl_m": 5.0}, "--owl-m 5 needs --allocate owl"),
        ({"allocate": "slope"}, "--allocate slope needs --slope-beta"),
        ({"allocate": "slope", "slope_beta": 0.0}, "--slope-beta 0 is outside (0, 1)"),
        ({"allocate": "slope", "slope_beta": -0.01}, "--slope-beta -0.01 is outside"),
        ({"allocate": "slope", "slope_beta": float("nan")}, "--slope-beta nan is outside"),
        ({"allocate": "slope", "slope_beta": 0.01, "pattern": "2:4"}, "--allocate slope conflicts with --pattern 2:4"),
        ({"allocate": "slope", "slope_beta": 0.01, "sparse_ckpt": "other"}, "slope conflicts with --sparse-ckpt"),
        ({"allocate": "owl", "pattern": "2:4"}, "--allocate owl conflicts with --pattern 2:4"),
        ({"allocate": "owl", "masks": Path("m.safetensors")}, "--allocate owl conflicts with --masks"),
        ({"allocate": "owl", "sparse_ckpt": "other"}, "--allocate owl conflicts with --sparse-ckpt"),
    ],
)
def test_options(options, says):
    with pytest.raises(BarberError) as refused:
        PruneConfig(ckpt="dense", out=Path("out"), **options)
    assert says in str(refused.value)


@pytest.mark.parametrize(("blocks", "sparsity", "beta"), [(4, 0.7, 0.05), (30, 0.6, 0.005), (2, 0.01, 0.02)])
def test_the_sparsity_rises_by_beta_around_its_mean(blocks, sparsity, beta):
    got = np.array(allocation.slope(blocks, sparsity, beta))
    np.testing.assert_allclose(np.diff(got), beta, rtol=1e-9)
    assert got.mean() == pytest.approx(sparsity, abs=1e-15) and got.min() >= 0 and got.max() <= 0.99


def test_one_block_has_the_overall_sparsity():
    assert allocation.slope(1, 0.6, 0.5) == [0.6]


@pytest.mark.parametrize(
    ("sparsity", "beta", "most"), [(0.1, 0.1, 0.066666), (0.8, 0.15, 0.126666), (0.995, 0.01, 0.001666)]
)
def test_a_slope_too_steep_is_refused_with_the_steepest(sparsity, beta, most):
    with pytest.raises(BarberError, match=f"use at most {most:g}$"):
        allocation.slope(4, sparsity, beta)
    assert max(allocation.slope(4, sparsity, most)) < 1


def test_every_block_is_pruned_by_its_share(tmp_path):
    write_model(tmp_path / "model", "llama", num_hidden_layers=4)
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (2, 8)))
    options = [
        "--samples",
        2,
        "--length",
        8,
        "--no-rebuild",
        "--sparsity",
        0.6,
        "--allocate",
        "slope",
        "--slope-beta",
        0.1,
    ]
    masks = prune_masks(tmp_path / "out", tmp_path / "model", tmp_path / "ids.npy", *options)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["allocation"] == pytest.approx([0.45, 0.55, 0.65, 0.75])
    for name, mask in masks.items():
        pruned = int(mask.shape[1] * record["allocation"][int(name.split(".")[2])])
        assert (mask.shape[1] - mask.sum(axis=1) == pruned).all(), name


def test_too_many_blocks_for_the_slope(tmp_path, capsys):
    from barber_jax import prune

    write_model(tmp_path / "model", "llama", num_hidden_layers=4)
    np.save(tmp_path / "ids.npy", np.zeros((2, 8), np.int32))
    config = PruneConfig(
        ckpt=str(tmp_path / "model"), out=tmp_path / "out", calibration=str(tmp_path / "ids.npy"), samples=2, length=8,
        sparsity=0.5, allocate="slope", slope_beta=0.4,
    )  # fmt: skip
    with pytest.raises(BarberError, match=r"--slope-beta 0\.4: with 4 blocks and sparsity 0\.5"):
        prune(config)
    assert not (tmp_path / "out").exists()
