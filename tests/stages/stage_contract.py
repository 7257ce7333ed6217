"""Base test of stages: sparsity kept, N:M kept, every family, both dtypes, a mesh, resuming, determinism."""

import json

import pytest
from base_contract import Contract, same_counts, zeros_are_the_masks
from cli import agreement

from barber_jax.stages import STAGES


class StageContract(Contract):
    """Inherit, and set `stage` and `options`.

    Attributes:
        stage: name in `STAGES`.
        axis: along which every group keeps its count of weights: 1 for outputs.
        swaps: whether the stage swaps any weight in this test.
    """

    stage: str
    axis: int = 1
    swaps = True

    def check(self, out, masks, start):
        assert same_counts(masks, start, self.axis)
        assert zeros_are_the_masks(out, masks)
        assert any((masks[name] != start[name]).any() for name in masks) == self.swaps
        record = json.loads((out / "run.json").read_text())
        for sub in (sub for block in record["blocks"] for sub in block["sub_blocks"]):
            if "validation_loss_after" in sub:
                # What does not help the held-out samples is undone, but for what is rounded to bfloat16 on the way.
                assert sub["validation_loss_after"] <= sub["validation_loss_before"] * (1 + 1e-3)
            for name, matrix in sub["matrices"].items():
                assert matrix["size"] - matrix["pruned"] == int(masks[name].sum())
                if "regrown" in matrix:
                    assert matrix["regrown"] == int((masks[name] & ~start[name]).sum())

    def test_nothing_pruned_stays_so(self, pruned):
        _, masks = pruned("out", "--sparsity", 0)
        assert all(mask.all() for mask in masks.values())

    def test_it_is_in_the_table(self):
        assert STAGES[self.stage].name == self.stage

    @pytest.mark.slow
    def test_offloaded_activations_change_nothing_but_rounding(self, pruned):
        _, here = pruned("here", "--batch", 2)
        _, away = pruned("away", "--batch", 2, "--offload-activations")
        assert agreement(here, away) >= self.mesh_agreement
