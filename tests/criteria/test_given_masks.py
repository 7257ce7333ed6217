"""Starting from other people's masks: a mask file, or the zeros of a pruned checkpoint."""

import json
import shutil

import numpy as np
import pytest
from checkpoints import BASE, write_model
from cli import prune_masks
from safetensors.numpy import load_file, save_file

from barber_jax.console.errors import BarberError
from barber_jax.convert.checkpoint import open_checkpoint
from barber_jax.criteria.starting import SparseCheckpointStart
from barber_jax.devices.mesh import Devices
from barber_jax.masks.mask_file import read_masks
from barber_jax.masks.pattern import SparsityPattern
from barber_jax.models import build_model

SMALL = ["--samples", 4, "--length", 16]


@pytest.fixture
def ckpt(tmp_path):
    write_model(tmp_path / "dense")
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (4, 16)))
    return tmp_path / "dense"


def run(tmp_path, name, *options):
    return prune_masks(tmp_path / name, tmp_path / "dense", tmp_path / "ids.npy", *SMALL, *options)


def same(a, b):
    assert a.keys() == b.keys()
    for name, mask in a.items():
        np.testing.assert_array_equal(mask, b[name], err_msg=name)


def test_rebuilding_magnitude_masks_is_magnitude_plus_rebuild(tmp_path, ckpt):
    start = run(tmp_path, "start", "--method", "magnitude", "--no-rebuild")
    settings = ["--granularity", "block", "--alpha", 0.5]
    want = run(tmp_path, "want", "--method", "magnitude", *settings)
    same(run(tmp_path, "masks", "--masks", tmp_path / "start" / "masks.safetensors", *settings), want)
    same(run(tmp_path, "sparse", "--sparse-ckpt", tmp_path / "start", *settings), want)
    assert any((start[name] != want[name]).any() for name in want)


def test_retained_sparsegpt_weights_come_back_from_a_sparse_checkpoint(tmp_path, ckpt):
    start = run(tmp_path, "start", "--method", "sparsegpt", "--no-rebuild")
    out = run(tmp_path, "out", "--sparse-ckpt", tmp_path / "start", "--retain-reconstruction", "--alpha", 0.5)
    updated, dense, got = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "start", ckpt, tmp_path / "out")
    )
    for name, mask in out.items():
        np.testing.assert_array_equal(got[name], np.where(mask, np.where(start[name], updated[name], dense[name]), 0))
    without = run(tmp_path, "without", "--sparse-ckpt", tmp_path / "start", "--alpha", 0.5)
    got = load_file(tmp_path / "without" / "model.safetensors")
    for name, mask in without.items():
        np.testing.assert_array_equal(got[name], np.where(mask, dense[name], 0))


@pytest.mark.parametrize("family", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_trained_biases_and_norms_come_back_from_a_sparse_checkpoint(family, tmp_path):
    write_model(tmp_path / "dense", **({"attention_bias": True} if family == "llama" else {"family": "opt"}))
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (4, 16)))
    start = run(tmp_path, "start", "--no-rebuild", "--reconstruct", 5, "--reconstruct-scope", "all")
    dense, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "start"))
    others = {name for name in dense if name not in start and (dense[name] != trained[name]).any()}
    assert any(name.endswith("norm.weight") for name in others) and any(name.endswith("bias") for name in others)
    given = ["--sparse-ckpt", tmp_path / "start"]
    same(run(tmp_path, "as it was", *given, "--no-rebuild"), start)
    for name, tensor in load_file(tmp_path / "as it was" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, trained[name], err_msg=name)
    # The dense model's, like its weights, unless what was given is to be retained; trained further it is what they
    # start from.
    for options, origin in (([], dense), (["--retain-reconstruction"], trained)):
        run(tmp_path, "rebuilt", *given, *options, "--alpha", 0.5, "--overwrite")
        got = load_file(tmp_path / "rebuilt" / "model.safetensors")
        assert all((got[name] == origin[name]).all() for name in others)
    run(tmp_path, "further", *given, "--no-rebuild", "--reconstruct", 5)
    before, after = (
        json.loads((tmp_path / name / "run.json").read_text())["blocks"][0]["sub_blocks"][0]
        for name in ("start", "further")
    )
    assert after["validation_loss_before"] == pytest.approx(before["validation_loss_after"], rel=1e-5)
    assert after["validation_loss_after"] <= after["validation_loss_before"]


def test_a_sparse_checkpoint_without_a_bias_is_an_error(tmp_path):
    write_model(tmp_path / "dense", attention_bias=True)
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (4, 16)))
    run(tmp_path, "start", "--no-rebuild")
    tensors = load_file(tmp_path / "start" / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.bias"]
    save_file(tensors, tmp_path / "start" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BarberError, match=r"layers\.1\.self_attn\.o_proj\.bias is missing"):
        run(tmp_path, "out", "--sparse-ckpt", tmp_path / "start")


@pytest.mark.filterwarnings("error:.*cast:RuntimeWarning")
@pytest.mark.parametrize("stages", [["--no-rebuild"], ["--retain-reconstruction", "--alpha", 0.5]])
def test_weights_that_do_not_fit_the_dense_dtype_are_named(tmp_path, stages):
    write_model(tmp_path / "dense", dtype="float16")
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, BASE["vocab_size"], (4, 16)))
    run(tmp_path, "start", "--method", "magnitude", "--no-rebuild")
    file, name = tmp_path / "start" / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = {key: tensor.astype(np.float32) for key, tensor in load_file(file).items()}
    tensors[name][tuple(np.argwhere(tensors[name])[0])] = 1e5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BarberError, match=f"tensor {name} gets values that do not fit float16"):
        run(tmp_path, "out", "--sparse-ckpt", tmp_path / "start", *stages)
    # No unfinished run either: resumed, it would fail again.
    assert not list(tmp_path.glob("out*"))


def test_masks_tell_which_zeros_of_a_checkpoint_are_kept_weights(tmp_path, ckpt):
    tensors = load_file(ckpt / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in tensors:
        if name.endswith("proj.weight"):
            tensors[name] = np.where(rng.random(tensors[name].shape) < 0.2, 0, tensors[name])
    save_file(tensors, ckpt / "model.safetensors", {"format": "pt"})
    settings = ["--granularity", "output1", "--alpha", 0.5]
    for method in (["magnitude", "--pattern", "2:4"], ["sparsegpt"]):
        want = run(tmp_path, "want", "--method", *method, *settings, "--overwrite")
        run(tmp_path, "start", "--method", *method, "--no-rebuild", "--overwrite")
        given = ["--masks", tmp_path / "start" / "masks.safetensors", "--sparse-ckpt", tmp_path / "start"]
        same(run(tmp_path, "both", *given, *settings, "--overwrite"), want)
    run(tmp_path, "other", "--method", "magnitude", "--no-rebuild")
    given[1] = tmp_path / "other" / "masks.safetensors"
    with pytest.raises(BarberError, match="is not zero everywhere"):
        run(tmp_path, "out", *given)


def test_mask_that_torch_prune_left_in_a_checkpoint_and_a_folder_as_masks(tmp_path, ckpt):
    start = run(tmp_path, "start", "--method", "magnitude", "--no-rebuild")
    tensors = load_file(ckpt / "model.safetensors")
    for name in start:
        # A kept weight that is zero does not count as pruned.
        tensors[name] = np.where(np.cumsum(start[name], axis=1) == 1, 0, tensors[name])
        tensors[f"{name}_orig"], tensors[f"{name}_mask"] = tensors.pop(name), start[name].astype(np.float32)
    shutil.copytree(ckpt, tmp_path / "left")
    save_file(tensors, tmp_path / "left" / "model.safetensors", {"format": "pt"})
    same(run(tmp_path, "out", "--sparse-ckpt", tmp_path / "left", "--no-rebuild"), start)
    assert read_masks(tmp_path / "out").sparsity == pytest.approx(0.5)
    same(run(tmp_path, "again", "--masks", tmp_path / "out", "--no-rebuild"), start)
    record = json.loads((tmp_path / "again" / "run.json").read_text())
    assert record["options"]["masks"] == str(tmp_path / "out" / "masks.safetensors")


def test_uneven_sparsity_is_kept(tmp_path, ckpt):
    run(tmp_path, "start", "--no-rebuild")
    tensors = load_file(tmp_path / "start" / "model.safetensors")
    rng = np.random.default_rng(0)
    counts = {}
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        tensors[name] = tensors[name] * (rng.random(tensors[name].shape) < rng.uniform(0.2, 1))
        counts[name] = np.count_nonzero(tensors[name], axis=1)
    save_file(tensors, tmp_path / "start" / "model.safetensors", {"format": "pt"})
    got = run(tmp_path, "out", "--sparse-ckpt", tmp_path / "start", "--alpha", 1.0)
    for name, mask in got.items():
        np.testing.assert_array_equal(mask.sum(1), counts[name])
    whole = 1 - sum(map(np.sum, counts.values())) / sum(mask.size for mask in got.values())
    assert read_masks(tmp_path / "out" / "masks.safetensors").sparsity == pytest.approx(whole)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["totals"]["sparsity"] == pytest.approx(whole)


def test_pattern_of_the_mask_file_is_kept(tmp_path, ckpt):
    run(tmp_path, "start", "--pattern", "2:4", "--no-rebuild")
    masks = tmp_path / "start" / "masks.safetensors"
    got = run(tmp_path, "out", "--masks", masks, "--alpha", 1.0)
    assert all((mask.reshape(len(mask), -1, 4).sum(-1) == 2).all() for mask in got.values())
    free = run(tmp_path, "free", "--masks", masks, "--alpha", 1.0, "--pattern", "unstructured")
    assert any((mask.reshape(len(mask), -1, 4).sum(-1) != 2).any() for mask in free.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "wanda"], "--method"),
        (["--sparsity", 0.5], "--sparsity"),
        (["--retain-reconstruction"], "--retain-reconstruction"),
        (["--pattern", "1:4"], "1 of every 4"),
    ],
)
def test_conflicts_are_errors(options, said, tmp_path, ckpt):
    run(tmp_path, "start", "--pattern", "2:4", "--no-rebuild")
    with pytest.raises(BarberError, match=said):
        run(tmp_path, "out", "--masks", tmp_path / "start" / "masks.safetensors", *options)
    assert not (tmp_path / "out").exists()


def test_masks_and_checkpoints_of_another_model_are_errors(tmp_path, ckpt):
    write_model(tmp_path / "wide", intermediate_size=64)
    write_model(tmp_path / "deep", num_hidden_layers=3)
    for other, said in (("wide", "_proj.weight has shape"), ("deep", r"layers\.2")):
        masks = tmp_path / f"{other}_out" / "masks.safetensors"
        prune_masks(masks.parent, tmp_path / other, tmp_path / "ids.npy", *SMALL, "--no-rebuild")
        with pytest.raises(BarberError, match=said):
            run(tmp_path, "out", "--masks", masks)
        with pytest.raises(BarberError, match=said):
            run(tmp_path, "out", "--sparse-ckpt", masks.parent)


def test_a_pruned_checkpoint_with_other_settings_is_refused(tmp_path, ckpt):
    """Its weights have the right shapes, but were made for other activations."""
    write_model(tmp_path / "sparse", rope_theta=5e5, vocab_size=99)
    dense, sparse = (open_checkpoint(str(tmp_path / name)) for name in ("dense", "sparse"))
    model = build_model(dense.config, np.dtype("float32"))
    with pytest.raises(BarberError, match=r"sparse: its rope theta .* is 500000.0, that of .*dense is 10000.0"):
        SparseCheckpointStart(sparse, dense, model, SparsityPattern.parse("unstructured", 0.5), Devices())
