"""Magnitude as a starting criterion."""

import numpy as np
from cli import prune_masks
from criterion_contract import CriterionContract
from safetensors.numpy import load_file


class TestMagnitude(CriterionContract):
    method = "magnitude"
    options = ("--method", "magnitude", "--no-rebuild")
    group = (0, 1)


def test_the_lowest_of_the_whole_matrix_are_pruned(tiny, tiny_ids, tmp_path):
    options = ["--method", "magnitude", "--no-rebuild", "--sparsity", 0.3, "--length", 16]
    masks = prune_masks(tmp_path / "out", tiny(), tiny_ids, *options)
    tensors = load_file(tiny() / "model.safetensors")
    for name, mask in masks.items():
        order = np.argsort(np.abs(tensors[name]), axis=None, kind="stable")
        wanted = np.ones(mask.size, bool)
        wanted[order[: int(mask.size * 0.3)]] = False
        np.testing.assert_array_equal(mask.ravel(), wanted, err_msg=name)
