"""Many devices give the masks of one: eight virtual CPU devices, in this process.

That every criterion and every stage does so is in their base tests; here are granularities, all shapes of a mesh, given
masks, and what does not fit.
"""

import json

import numpy as np
import pytest
from cli import ORACLES, agreement, command, prune_masks
from safetensors.numpy import load_file

from barber_jax.console.errors import BarberError

LLAMA, IDS = ORACLES / "llama", "calibration_ids.npy"
MESHES = ["data=8,model=1", "data=1,model=8", "data=4,model=2", "data=2,model=4"]
SETTINGS = {
    "output1": ["--granularity", "output1"],
    "input1": ["--granularity", "input1"],
    "layer": ["--granularity", "layer"],
    "block": ["--granularity", "block", "--method", "magnitude"],
    "2:4": ["--pattern", "2:4"],
    "sparsegpt": ["--method", "sparsegpt", "--retain-reconstruction"],
}
RUN = ["--samples", "8", "--length", "64", "--alpha", "0.1"]


def check(setting, mesh, tmp_path, family="llama"):
    """Assert that a mesh gives the masks of one device."""
    folder, options = ORACLES / family, SETTINGS[setting]
    one = prune_masks(tmp_path / "one", folder, folder / IDS, *RUN, *options)
    many = prune_masks(tmp_path / "many", folder, folder / IDS, *RUN, *options, "--mesh", mesh)
    # Column after column sparsegpt turns rounding into other weights: two right programs differ by 1 %.
    assert agreement(one, many) >= (0.98 if setting == "sparsegpt" else 0.9995)
    assert sum(m.sum() for m in many.values()) == sum(m.sum() for m in one.values())
    if setting == "output1":
        for matrix, mask in one.items():
            np.testing.assert_array_equal(many[matrix].sum(1), mask.sum(1))
    device = json.loads((tmp_path / "many" / "run.json").read_text())["device"]
    assert device["count"] == np.prod([int(part.partition("=")[2]) for part in mesh.split(",")])


@pytest.mark.parametrize("setting", ["input1", "layer", "block"])
def test_every_granularity_on_a_mesh(setting, tmp_path):
    check(setting, "data=2,model=2", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_mesh_gives_the_masks_of_one_device(setting, mesh, tmp_path):
    check(setting, mesh, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_opt_on_every_mesh(mesh, tmp_path):
    check("output1", mesh, tmp_path, "opt")


@pytest.mark.parametrize("start", ["masks", "sparse", "offloaded"])
def test_given_masks_and_offloaded_streams_on_a_mesh(start, tmp_path):
    first = prune_masks(tmp_path / "first", LLAMA, LLAMA / IDS, *RUN, "--no-rebuild")
    options = {
        "masks": ["--masks", tmp_path / "first" / "masks.safetensors"],
        "sparse": ["--sparse-ckpt", tmp_path / "first", "--retain-reconstruction"],
        "offloaded": ["--batch", "2", "--offload-activations"],
    }[start]
    one = prune_masks(tmp_path / "one", LLAMA, LLAMA / IDS, *RUN, *options)
    many = prune_masks(tmp_path / "many", LLAMA, LLAMA / IDS, *RUN, *options, "--mesh", "data=2,model=2")
    assert agreement(one, many) >= 0.9995
    # The offloaded run starts from wanda's own masks, which are those of the first run; all three rebuild them.
    assert agreement(first, one) < 1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8,model=1", "data=2,model=4"])
@pytest.mark.parametrize(
    ("options", "least"),
    [
        (["--alpha", "auto", "--method", "magnitude"], 0.9995),
        (["--no-rebuild", "--refine", "10"], 0.99),
        (["--reconstruct", "6", "--reconstruct-batch", "8", "--no-rebuild"], 0.9995),
    ],
    ids=["chosen", "refined", "trained"],
)
def test_stages_on_a_mesh(options, least, mesh, tmp_path):
    """Choices, refinement and training; as many samples as hold out the same ones on every mesh."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 200, (64, 16)))
    common = ["--samples", "64", "--length", "16", "--token-weighting", "norm", *options]
    one = prune_masks(tmp_path / "one", LLAMA, tmp_path / "ids.npy", *common)
    many = prune_masks(tmp_path / "many", LLAMA, tmp_path / "ids.npy", *common, "--mesh", mesh)
    assert agreement(one, many) >= least
    if "--reconstruct" in options:
        tensors = load_file(tmp_path / "one" / "model.safetensors")
        for matrix, values in load_file(tmp_path / "many" / "model.safetensors").items():
            assert np.median(np.abs(values - tensors[matrix])) < 1e-4


@pytest.mark.parametrize(
    "method", ["wanda", *(pytest.param(m, marks=pytest.mark.slow) for m in ("magnitude", "sparsegpt"))]
)
def test_offloaded_activations_change_no_bit(method, tmp_path):
    options = [*RUN, "--method", method, "--batch", "2"]
    here = prune_masks(tmp_path / "here", LLAMA, LLAMA / IDS, *options)
    away = prune_masks(tmp_path / "away", LLAMA, LLAMA / IDS, *options, "--offload-activations")
    for name, mask in here.items():
        np.testing.assert_array_equal(away[name], mask)
    losses = [
        [(sub["loss_before"], sub["loss_after"]) for block in record["blocks"] for sub in block["sub_blocks"]]
        for record in (json.loads((tmp_path / run / "run.json").read_text()) for run in ("here", "away"))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "complaint"),
    [
        ("data=3", "3 does not divide the 8 samples"),
        ("model=5", "5 does not divide the 64 outputs of self_attn.q_proj"),
        ("data=4,model=4", "needs 16 devices; there are 8"),
        ("data=0", "not of the form"),
        ("rows=2", "not of the form"),
        ("data=2,data=2", "not of the form"),
    ],
)
def test_meshes_that_do_not_fit(mesh, complaint, tmp_path):
    with pytest.raises(BarberError, match=complaint):
        prune_masks(tmp_path / "out", LLAMA, LLAMA / IDS, *RUN, "--mesh", mesh)
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_from_the_command_line(tmp_path):
    line = ["--ckpt", LLAMA, "--calibration", LLAMA / IDS, *RUN, "--no-rebuild", "--method", "magnitude"]
    done = command("prune", *line, "--out", tmp_path / "out", "--mesh", "data=2", devices=4)
    assert done.returncode == 0 and done.stderr.startswith("2 of 4 x cpu"), done.stderr
