"""The rebuild as a stage: every granularity, N:M, retained updates, alpha chosen by validation."""

import json

import numpy as np
import pytest
from cli import masks_of, prune_masks
from stage_contract import StageContract

from barber_jax.console.errors import BarberError
from barber_jax.masks.selector import Selector


class TestRebuild(StageContract):
    stage = "rebuild"
    options = ("--alpha", 0.5)


@pytest.mark.slow
class TestRebuildWithAlphaChosen(StageContract):
    stage = "rebuild"
    options = ("--alpha", "auto", "--token-weighting", "norm", "--target", "same")


@pytest.mark.slow
class TestRebuildOfSparseGPT(StageContract):
    stage = "rebuild"
    options = ("--method", "sparsegpt", "--retain-reconstruction", "--alpha", 0.5, "--granularity", "output1")
    mesh_agreement = 0.98


@pytest.mark.parametrize(
    ("granularity", "axis"), [("output1", 1), ("input1", 0), ("layer", (0, 1)), ("block", None)], ids=str
)
def test_every_comparison_group_keeps_its_count(granularity, axis, tiny, tiny_ids, tmp_path):
    line = ["--samples", 4, "--length", 16, "--alpha", 0.7, "--granularity", granularity, "--save-start"]
    masks = prune_masks(tmp_path / "out", tiny(), tiny_ids, *line)
    start = masks_of(tmp_path / "out", "start_masks.safetensors")
    assert any((masks[name] != start[name]).any() for name in masks)
    if axis is not None:
        for name, mask in masks.items():
            np.testing.assert_array_equal(mask.sum(axis=axis), start[name].sum(axis=axis), err_msg=name)
        return
    for block in range(2):
        for sub in ("self_attn", "mlp"):
            names = [name for name in masks if f"layers.{block}.{sub}." in name]
            assert sum(masks[name].sum() for name in names) == sum(start[name].sum() for name in names)
            # Weights move between the matrices of a sub-block.
            assert any(masks[name].sum() != start[name].sum() for name in names)


def test_n_of_m_is_rebuilt_within_outputs_alone(tiny, tiny_ids, tmp_path):
    with pytest.raises(BarberError, match="N:M patterns are rebuilt within an output"):
        prune_masks(tmp_path / "out", tiny(), tiny_ids, "--pattern", "2:4", "--granularity", "layer")


@pytest.mark.parametrize(
    "options", [("--granularity", "output1"), ("--pattern", "2:4", "--method", "sparsegpt")], ids=("output1", "2:4")
)
def test_top_k_gives_the_masks_of_counting(options, tiny, tiny_ids, tmp_path, monkeypatch):
    used, implementation = [], Selector.implementation
    monkeypatch.setattr(Selector, "implementation", lambda *given: used.append(implementation(*given)) or used[-1])
    masks = {}
    for how in ("count", "top_k"):
        line = ["--samples", 4, "--length", 16, "--alpha", 0.5, "--selection", how, *options]
        masks[how] = prune_masks(tmp_path / how, tiny(), tiny_ids, *line)
        assert set(used) == {how}
        assert json.loads((tmp_path / how / "run.json").read_text())["options"]["selection"] == how
        used.clear()
    for name, mask in masks["count"].items():
        np.testing.assert_array_equal(masks["top_k"][name], mask, err_msg=name)


def test_a_second_round_rebuilds_what_the_first_one_left(tiny, tiny_ids, tmp_path):
    """Of the first sub-block, whose inputs never change: as two runs, the second from the masks of the first."""
    common = ["--samples", 4, "--length", 16, "--alpha", 0.5, "--granularity", "output1"]
    once = prune_masks(tmp_path / "once", tiny(), tiny_ids, *common, "--method", "sparsegpt")
    given = ["--masks", tmp_path / "once" / "masks.safetensors"]
    again = prune_masks(tmp_path / "again", tiny(), tiny_ids, *common, *given)
    twice = prune_masks(tmp_path / "twice", tiny(), tiny_ids, *common, "--method", "sparsegpt", "--rounds", 2)
    first = [name for name in once if "layers.0.self_attn" in name]
    for name in first:
        np.testing.assert_array_equal(twice[name], again[name], err_msg=name)
    assert any((once[name] != twice[name]).any() for name in first)
